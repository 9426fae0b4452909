"""The sections of a policy: variants, calibration, text, workload, serving; each checked by itself.

What they say together is checked by the policy.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from quantgate.gate import Refused, Scheme, SpecModel
from quantgate.units import Quantity, parse_quantity, units_of

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
        if "group_size" in self.options:
            # In one place, which what is compared with the variant reads too.
            message = "group_size is no option; write beside scheme: group_size: 128"
            raise Refused((("options", "group_size"), message))
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
