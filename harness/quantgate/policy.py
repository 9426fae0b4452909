"""The policy: what a release builds, serves and measures, and the gates each variant must pass.

`load_policy` is the only way in; whatever it returns can be carried out and judged, and whatever it
refuses is refused with `file:line`, what was expected and what to write.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from quantgate.files import sha256_of_bytes
from quantgate.gate import DEFAULT_CONFIDENCE, Confidence, Gate, Refused, Scheme, SpecModel
from quantgate.policy_errors import problems_of
from quantgate.spec import Location, SpecError, read_document
from quantgate.statistics.blocks import MIN_BLOCKS
from quantgate.units import Quantity, did_you_mean, parse_metric, parse_quantity, units_of

SOURCE = "source"
"""The reference that is the source model in its own precision."""

RESERVED_NAMES = {SOURCE: "the source model", "champion": "the champion's arm"}
"""Names of folders in a release that no variant may take."""

_MAX_WINDOW_MS = 50
"""The server's own limit."""

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
NonNegativeInt: TypeAlias = Annotated[int, Field(ge=0)]
Lengths: TypeAlias = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]


def _quantity_of(dimension: str) -> BeforeValidator:
    unit = units_of(dimension)[0]

    def read(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value
        if not isinstance(value, str):
            raise Refused(((), f"{value:g} has no unit; write: {value:g} {unit}"))
        quantity = parse_quantity(value)
        if quantity.dimension != dimension:
            raise Refused(((), f'"{value}" is not a {dimension}; write: {quantity.value:g} {unit}'))
        if quantity.value <= 0:
            raise Refused(((), f'"{value}" is not more than 0'))
        return quantity

    return BeforeValidator(read)


RequestRate: TypeAlias = Annotated[Quantity, _quantity_of("request rate")]
Duration: TypeAlias = Annotated[Quantity, _quantity_of("time")]


class VariantSpec(SpecModel):
    """One candidate: a scheme to build, or (`path`) an artifact that somebody brings."""

    scheme: Scheme
    group_size: PositiveInt | None = None
    """Input channels that share one scale; GPTQ only, None for the scheme's default."""
    path: str | None = None
    """A folder to use as it is; None to build the variant from the source model."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @property
    def is_calibrated(self) -> bool:
        """Building it needs calibration text."""
        return self.scheme.endswith("-gptq") and self.path is None

    @model_validator(mode="after")
    def _group_size_is_for_gptq(self) -> VariantSpec:
        if self.group_size is not None and not self.scheme.endswith("-gptq"):
            message = f'"group_size" is not for scheme "{self.scheme}"; remove it'
            raise Refused((("group_size",), message))
        return self


class Calibration(SpecModel):
    """Text that calibrated schemes look at; it may not overlap with the golden sets."""

    path: str
    max_documents: PositiveInt = 128
    max_tokens: PositiveInt = 512
    """Per document."""


class Distribution(SpecModel):
    """The text on which KL, top-1 agreement and perplexity are measured, teacher-forced."""

    golden_set: str
    max_tokens: PositiveInt = 512
    """Per document."""


class Workload(SpecModel):
    """The seeded load that every arm replays, block by block: a burst, then open-loop arrivals."""

    seed: NonNegativeInt
    burst_requests: PositiveInt
    """Sent at once at the start of a block: the throughput of a full batch."""
    rate: RequestRate
    """Of the Poisson arrivals that follow; below saturation, or latency has no steady value."""
    requests: PositiveInt
    """Of the Poisson arrivals, per block: the latencies."""
    prompt_tokens: Lengths
    output_tokens: Lengths
    warmup_requests: NonNegativeInt = 4
    """Sent before each block and not measured."""
    blocks: PositiveInt = 6
    """Per arm."""

    @model_validator(mode="after")
    def _lengths_are_ranges(self) -> Workload:
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if low > high:
                raise Refused(((name,), f"{name} [{low}, {high}] is empty; write: [{high}, {low}]"))
        return self


class Serving(SpecModel):
    """How every variant is served while it is measured; the same for all arms."""

    max_batch_size: PositiveInt = 16
    max_batched_tokens: PositiveInt = 512
    kv_tokens: PositiveInt = 16_384
    threads: PositiveInt | None = None
    """None for all cores."""
    max_context: PositiveInt | None = None
    """Longest sequence in tokens; None for the model's whole context. A model with a sliding window
    is served, and scored, up to its window only."""
    admission_window: Duration | None = None
    """How long an underfilled engine waits for company, up to 50 ms; None for not at all."""
    native_kernels: bool = True
    """Whether a CPU server may compile kernels for its processor; if it cannot, torch computes."""
    timeout: Duration = Quantity(60.0, "s")
    """A request that is not answered in this time has failed."""
    caches: bool = False
    """Whether the servers reuse prefixes, join equal requests and keep answers and embeddings. Off,
    every request is computed, and a figure is the variant's, not its workload's repetition."""

    @model_validator(mode="after")
    def _window_is_short(self) -> Serving:
        window = self.admission_window
        if window is not None and window.to("ms") > _MAX_WINDOW_MS:
            message = f"{window} is more than {_MAX_WINDOW_MS} ms; write: {_MAX_WINDOW_MS} ms"
            raise Refused((("admission_window",), message))
        return self


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
    return [
        (("golden_sets", index), f'golden set "{name}" is listed twice; remove one')
        for index, name in enumerate(names)
        if name in names[:index]
    ]


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
