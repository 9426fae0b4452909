"""The policy: what a release builds, serves and measures, and the gates each variant must pass.

`load_policy` is the only way in; whatever it returns can be carried out and judged, and whatever it
refuses is refused with `file:line`, what was expected and what to write.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from quantgate.files import sha256_of_bytes
from quantgate.gate import DEFAULT_CONFIDENCE, Confidence, Gate, Refused, Scheme, SpecModel
from quantgate.policy_errors import problems_of
from quantgate.policy_sections import Calibration, Distribution, Serving, VariantSpec, Workload
from quantgate.spec import Location, SpecError, read_document
from quantgate.statistics.blocks import MIN_BLOCKS
from quantgate.units import DISTRIBUTION_NOUNS, SERVED_NOUNS, did_you_mean, parse_metric

SOURCE = "source"
"""The reference that is the source model in its own precision."""

_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

RESERVED_NAMES = {SOURCE: "the source model", "champion": "the champion's arm"}
"""Names of folders in a release that no variant may take."""


class Policy(SpecModel):
    """A named, complete set of gates and everything needed to measure them."""

    policy: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str = Field(min_length=1)
    """"demo", a folder, or a hub id."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    reference: str = SOURCE
    """What quality is compared with: "source", or a variant."""
    champion: str = "bf16"
    """What performance is compared with where nothing serves yet: a variant."""
    variants: dict[str, VariantSpec] = Field(min_length=1)
    calibration: Calibration | None = None
    golden_sets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names under golden_sets/, or folders; known by the last part of the path."""
    distribution: Distribution | None = None
    workload: Workload | None = None
    serving: Serving = Serving()
    confidence: Confidence = DEFAULT_CONFIDENCE
    gates: Annotated[tuple[Gate, ...], Field(strict=False, min_length=1)]

    _path: Path = PrivateAttr(default=Path("<policy>"))
    _sha256: str = PrivateAttr(default="")
    _gate_lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it was read from."""
        return self._path

    @property
    def sha256(self) -> str:
        """Of the bytes of the file."""
        return self._sha256

    @property
    def golden_set_names(self) -> tuple[str, ...]:
        return tuple(PurePath(entry).name for entry in self.golden_sets)

    def gate_line(self, gate_id: str) -> int:
        """The line on which the gate is written, for annotations."""
        return self._gate_lines[gate_id]

    @model_validator(mode="after")
    def _is_coherent(self) -> Policy:
        # Frozen to everyone else: a gate without a confidence of its own takes the policy's here,
        # so that a gate is complete wherever it is handed on.
        resolved = tuple(
            gate
            if "confidence" in gate.model_fields_set
            else gate.model_copy(update={"confidence": self.confidence})
            for gate in self.gates
        )
        object.__setattr__(self, "gates", resolved)
        problems = [
            *_baseline_problems(self),
            *_golden_set_problems(self),
            *_gate_problems(self),
            *_variant_problems(self),
            *_serving_problems(self),
        ]
        if problems:
            raise Refused(*problems)
        return self


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        SpecError: with one `file:line: message` for each thing that is wrong.
    """
    document = read_document(path)
    try:
        policy = Policy.model_validate(document.data)
    except ValidationError as error:
        problems = [
            problem for details in error.errors() for problem in problems_of(document, details)
        ]
        raise SpecError(path, problems) from error
    policy._path = path
    policy._sha256 = sha256_of_bytes(document.content)
    policy._gate_lines = {
        gate.id: document.line_of(("gates", index)) for index, gate in enumerate(policy.gates)
    }
    return policy


def required_gates(policy: Policy, variant: str) -> tuple[Gate, ...]:
    """The gates this variant must pass, in the order they are written; never empty.

    Raises:
        KeyError: the policy has no such variant.
    """
    scheme = policy.variants[variant].scheme
    return tuple(gate for gate in policy.gates if _applies(gate, variant, scheme))


def _applies(gate: Gate, variant: str, scheme: Scheme) -> bool:
    return (gate.variants is None or variant in gate.variants) and (
        gate.schemes is None or scheme in gate.schemes
    )


def _baseline_problems(policy: Policy) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    for name, meaning in RESERVED_NAMES.items():
        if name in policy.variants:
            message = f'"{name}" is the name of {meaning}; give the variant another name'
            problems.append((("variants", name), message))
    if policy.champion not in policy.variants:
        problems.append((("champion",), _unknown("champion", policy.champion, policy.variants)))
    references = [SOURCE, *policy.variants]
    if policy.reference not in references:
        problems.append((("reference",), _unknown("reference", policy.reference, references)))
    return problems


def _golden_set_problems(policy: Policy) -> list[tuple[Location, str]]:
    names = policy.golden_set_names
    problems: list[tuple[Location, str]] = []
    for index, name in enumerate(names):
        here: Location = ("golden_sets", index)
        if name in names[:index]:
            problems.append((here, f'golden set "{name}" is listed twice; remove one'))
        elif not _SET_NAME.fullmatch(name):
            message = "metrics are named for it, so its name is letters, digits, - and _; rename it"
            problems.append((here, f'golden set "{name}": {message}'))
        elif name in (*DISTRIBUTION_NOUNS, *SERVED_NOUNS):
            message = "is what metrics of the distribution are named for; rename it"
            problems.append((here, f'golden set "{name}": {message}'))
    return problems


def _gate_problems(policy: Policy) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    seen: set[str] = set()
    for index, gate in enumerate(policy.gates):
        here: Location = ("gates", index)
        if gate.id in seen:
            problems.append(((*here, "id"), f'gate id "{gate.id}" is already used; rename one'))
        seen.add(gate.id)
        unknown = [name for name in gate.variants or () if name not in policy.variants]
        problems += [
            ((*here, "variants"), _unknown("variant", name, policy.variants)) for name in unknown
        ]
        applies = any(_applies(gate, name, spec.scheme) for name, spec in policy.variants.items())
        if not unknown and not applies:
            problems.append((here, f'gate "{gate.id}" applies to no variant; widen or remove it'))
        if message := _not_measured(policy, gate):
            problems.append(((*here, "metric"), message))
    return problems


def _not_measured(policy: Policy, gate: Gate) -> str | None:
    """Why nothing in the policy would measure the gate's metric; None when something does."""
    name = parse_metric(gate.metric)
    if name.is_golden_set:
        if name.stem in policy.golden_set_names:
            return None
        return f"{gate.metric}: " + _unknown("golden set", name.stem, policy.golden_set_names)
    if name.section == "quality" and policy.distribution is None:
        return f'{gate.metric} needs "distribution"; write: distribution: {{golden_set: NAME}}'
    if name.section in ("perf", "stability"):
        if policy.workload is None:
            return (
                f'{gate.metric} needs "workload"; write: workload: {{seed: 0, rate: 20 req/s, …}}'
            )
        if gate.test == "ratio" and policy.workload.blocks < MIN_BLOCKS:
            return (
                f"{gate.metric} is compared over blocks and workload.blocks is "
                f"{policy.workload.blocks}; write: blocks: {MIN_BLOCKS} or more"
            )
    return None


def _variant_problems(policy: Policy) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    for name, spec in policy.variants.items():
        here: Location = ("variants", name)
        if not required_gates(policy, name):
            message = f'no gate applies to variant "{name}", and absence never passes; add a gate'
            problems.append((here, message))
        if spec.is_calibrated and policy.calibration is None:
            message = f'{spec.scheme} needs "calibration"; write: calibration: {{path: FOLDER}}'
            problems.append((here, message))
    return problems


def _serving_problems(policy: Policy) -> list[tuple[Location, str]]:
    """What is scored and sent must fit into what is served."""
    limit = policy.serving.max_context
    if limit is None:
        return []
    problems: list[tuple[Location, str]] = []
    if policy.distribution is not None and policy.distribution.max_tokens > limit:
        found = policy.distribution.max_tokens
        message = f"max_tokens is {found}, beyond serving.max_context; write: max_tokens: {limit}"
        problems.append((("distribution",), message))
    if policy.workload is not None:
        longest = policy.workload.prompt_tokens[1] + policy.workload.output_tokens[1]
        if longest > limit:
            message = (
                f"a request may have {longest} tokens, beyond serving.max_context {limit}; "
                f"write: max_context: {longest}, or shorter ones"
            )
            problems.append((("workload",), message))
    return problems


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    if not known:
        return f'unknown {what} "{name}"; none is listed'
    return f'unknown {what} "{name}"; expected one of {", ".join(known)}{did_you_mean(name, known)}'
