"""What a release will do, checked before the first weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import UsageError
from quantgate.machine import choose_device, processor_of
from quantgate.policy import Policy
from quantgate.policy_sections import Serving
from quantgate.quality.golden import GoldenSet, find_golden_set, load_golden_set
from quantgate.quality.results import metrics_of
from quantgate.quality.scoring import BINARY_SCORERS
from quantgate.quality.stage import engine_sha256
from quantgate.server import ServerOptions
from quantgate.spec import Problem, SpecError
from quantgate.units import did_you_mean, parse_metric
from quantgate.variants.calibration import CalibrationSet, load_calibration
from quantgate.variants.source import DEMO_MODEL, SourceModel, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """What the command line may say beside the policy; None leaves it to the policy."""

    policy: Policy
    runs: Path
    serving_config: Path
    model: str | None = None
    device: str | None = None
    variants: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything checked before the first weight is touched."""

    policy: Policy
    source: SourceModel
    device: str
    names: tuple[str, ...]
    golden_sets: tuple[GoldenSet, ...]
    documents: GoldenSet | None
    calibration: CalibrationSet | None
    server: ServerOptions
    runs: Path

    @property
    def timeout_s(self) -> float:
        return self.policy.serving.timeout.to("s")

    @property
    def dtype(self) -> str:
        # Where the CPU multiplies BF16 by emulation, FP32 arithmetic on the variant's own rounded
        # weights is both faster and the same everywhere.
        return "float32" if self.device == "cpu" else "auto"

    @property
    def models_together(self) -> int:
        """A server with one thread leaves the other core to its neighbour; a GPU is not shared."""
        return 2 if self.device == "cpu" and self.server.threads == 1 else 1

    @property
    def all_sets(self) -> list[GoldenSet]:
        """The golden sets, and the documents that the distribution is measured on."""
        return [*self.golden_sets, *([self.documents] if self.documents else [])]

    def identity(self) -> dict[str, object]:
        """What must be equal for an interrupted release to go on."""
        return {
            "policy_sha256": self.policy.sha256,
            "source_sha256": self.source.sha256,
            "engine_sha256": engine_sha256(),
            "processor": processor_of(self.device),
            "device": self.device,
            "variants": list(self.names),
            "golden_sets": {g.name: g.items_sha256 for g in self.all_sets},
        }


def make_plan(request: ReleaseRequest) -> Plan:
    """Reads and checks everything a policy names.

    Raises:
        UsageError: a model, golden set, calibration file or variant cannot be used.
    """
    policy = request.policy
    source = open_source(request.model or _model_of(policy))
    names = tuple(request.variants or policy.variants)
    unknown = [name for name in names if name not in policy.variants]
    if unknown:
        raise UsageError(f"--variants {unknown[0]}: the policy has {', '.join(policy.variants)}.")
    device = choose_device(request.device or policy.device)
    golden_folders = [base / "golden_sets" for base in project_folders(policy)]

    def golden(name: str) -> GoldenSet:
        return load_golden_set(find_golden_set(name, folders=golden_folders))

    calibration = None
    if policy.calibration is not None:
        calibration = load_calibration(
            _find_file(policy, policy.calibration.path),
            source,
            max_documents=policy.calibration.max_documents,
            max_tokens=policy.calibration.max_tokens,
        )
    golden_sets = tuple(golden(name) for name in policy.golden_sets)
    _check_gates(policy, golden_sets)
    return Plan(
        policy=policy,
        source=source,
        device=device,
        names=names,
        golden_sets=golden_sets,
        documents=golden(policy.distribution.golden_set) if policy.distribution else None,
        calibration=calibration,
        server=_server_options(policy.serving, device),
        runs=request.runs,
    )


def _server_options(serving: Serving, device: str) -> ServerOptions:
    window = serving.admission_window
    return ServerOptions(
        device=device,
        threads=serving.threads,
        max_batch_size=serving.max_batch_size,
        max_batched_tokens=serving.max_batched_tokens,
        kv_tokens=serving.kv_tokens,
        max_context=serving.max_context,
        admission_window_ms=None if window is None else window.to("ms"),
        native_kernels="auto" if serving.native_kernels else "off",
        caches=serving.caches,
    )


def _check_gates(policy: Policy, golden_sets: Sequence[GoldenSet]) -> None:
    """A scorer, check or tag that a set does not have would be missed hours later, as INVALID.

    Raises:
        SpecError: with the line of each such gate.
    """
    known = {golden.name: metrics_of(golden) for golden in golden_sets}
    problems = []
    for gate in policy.gates:
        name = parse_metric(gate.metric)
        metrics = known.get(name.stem) if name.is_golden_set else None
        if metrics is None:
            continue
        line = policy.gate_line(gate.id)
        if gate.metric not in metrics:
            whole = [m for m in metrics if parse_metric(m).noun == name.stem]
            near = did_you_mean(gate.metric, metrics)
            message = (
                f"golden set {name.stem} does not yield {gate.metric}; expected one of "
                f"{', '.join(whole)}, or one of a tag's items, {name.stem}.tag-TAG{near}"
            )
            problems.append(Problem(line, message))
        elif gate.sequential and name.statistic not in BINARY_SCORERS:
            message = (
                f"sequential is for scores of 0 and 1 ({', '.join(sorted(BINARY_SCORERS))}), and "
                f"{name.statistic} is none; remove it"
            )
            problems.append(Problem(line, message))
    if problems:
        raise SpecError(policy.path, problems)


def project_folders(policy: Policy) -> list[Path]:
    """Where a policy's files are looked for: its project (the folder that holds gates/policies/),
    its own folder, and last the working folder, which may be another project."""
    folder = policy.path.resolve().parent
    return [folder.parents[1], folder, Path.cwd()]


def _model_of(policy: Policy) -> str:
    """A folder named in a policy is looked for like its files; other names are left as they are."""
    if policy.model == DEMO_MODEL:
        return DEMO_MODEL
    folders = [base / policy.model for base in project_folders(policy)]
    return str(next((folder for folder in folders if folder.is_dir()), policy.model))


def _find_file(policy: Policy, name: str) -> Path:
    for base in project_folders(policy):
        if (base / name).is_file():
            return base / name
    looked = ", ".join(str(base / name) for base in project_folders(policy))
    raise UsageError(f"{policy.path}: file {name!r} not found; looked for {looked}.")
