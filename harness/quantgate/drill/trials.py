"""Trials, one fault in one variant, and what the same gates say of the sound variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantgate.drill.fault import AnyFault, GoldenFault, ServingFault
from quantgate.drill.layers import BEHAVIOUR, DISTRIBUTION, LAYERS, SERVED, Measured
from quantgate.drill.planting import Planted
from quantgate.variants.build import Variant
from quantgate.verdict import Outcome, Verdict


@dataclass(slots=True, kw_only=True)
class Trial:
    """One fault in one variant, on its way through the layers."""

    key: str
    fault: AnyFault
    sound: Variant
    mutant: Planted
    measured: dict[str, Measured] = field(default_factory=dict)
    verdicts: dict[str, Sequence[Verdict]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        """Where it can differ from the sound variant at all."""
        match self.fault:
            case GoldenFault():
                return (BEHAVIOUR,)
            case ServingFault(planted=None) | ServingFault(is_server_only=True):
                return (SERVED, BEHAVIOUR)
            case ServingFault():
                return (DISTRIBUTION, SERVED, BEHAVIOUR)
        return LAYERS

    def take(self, layer: str, measured: Measured, verdicts: Sequence[Verdict]) -> None:
        """Keeps what a layer found."""
        self.measured[layer] = measured
        self.verdicts[layer] = verdicts
        self.seconds += measured.seconds


class Sound:
    """What the gates say of the sound variants: only a gate that passes there can catch."""

    def __init__(self) -> None:
        self._measured: dict[tuple[str, str], Measured] = {}
        self._verdicts: dict[str, dict[str, Verdict]] = {}

    def take(
        self, layer: str, variant: str, measured: Measured, verdicts: Sequence[Verdict]
    ) -> None:
        self._measured[layer, variant] = measured
        self._verdicts.setdefault(variant, {}).update({v.gate_id: v for v in verdicts})

    def measured(self, layer: str, variant: str) -> Measured | None:
        """None where no trial came to that layer."""
        return self._measured.get((layer, variant))

    def turned(self, trial: Trial, layer: str, *outcomes: Outcome) -> list[Verdict]:
        """Verdicts of gates that pass on the sound variant and have one of these outcomes now."""
        sound = self._verdicts.get(trial.sound.name, {})
        return [
            verdict
            for verdict in trial.verdicts.get(layer, ())
            if verdict.outcome in outcomes
            and verdict.gate_id in sound
            and sound[verdict.gate_id].outcome is Outcome.PASS
        ]

    def is_judged(self, trial: Trial) -> bool:
        """Whether any gate that passes on the sound variant looked at it."""
        return any(self.turned(trial, layer, *Outcome) for layer in LAYERS)

    def why_not_judged(self, trial: Trial) -> str:
        """Which gates are missing, of a trial that is not judged."""
        blind = [v.gate_id for verdicts in trial.verdicts.values() for v in verdicts]
        if blind:
            return f"not judged: {', '.join(blind)} do not pass on the sound variant either"
        layers = " or ".join(trial.layers)
        return f"not judged: no gate of the policy looks at {layers}, where it could show"

    def has_caught(self, trial: Trial) -> bool:
        return any(self.turned(trial, layer, Outcome.FAIL, Outcome.INVALID) for layer in LAYERS)

    def blind_gates(self) -> Mapping[str, tuple[str, ...]]:
        """By variant: gates that do not pass on the sound one."""
        blind = {
            name: tuple(v.gate_id for v in verdicts.values() if v.outcome is not Outcome.PASS)
            for name, verdicts in self._verdicts.items()
        }
        return {name: gates for name, gates in blind.items() if gates}
