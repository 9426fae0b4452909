"""What can be known of a variant before any weight is touched: seconds here save minutes later.

Reads the headers of the source's weights, the policy and the calibration text; loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantgate.plan import Plan
from quantgate.policy_sections import VariantSpec
from quantgate.quality.overlap import find_overlap
from quantgate.variants.scheme import CALIBRATED_SCHEMES, DEFAULT_GROUP_SIZE

NF4_BLOCK = 64
_MARLIN_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What was found for one variant."""

    variant: str
    kernel: str
    """What its quantized Linears will be computed by on the policy's device."""
    problems: tuple[str, ...]
    """Why building it would be wasted, or what it would be worth nothing for; empty for none."""
    overlap: str | None
    """Golden items in the calibration text: the variant's quality gates are then INVALID."""


def check_variants(plan: Plan) -> list[Preflight]:
    """Checks each variant that the plan would build, in its order."""
    # Here, since judging goes through the same pipeline module and has no torch.
    from quantgate.audit.checkpoint import Checkpoint

    with Checkpoint(plan.source.folder) as checkpoint:
        widths = linear_widths(
            {name: tensor.shape for name, tensor in checkpoint.tensors.items()},
            vocabulary=int(plan.source.config.get("vocab_size", 0)),
        )
    overlap = None
    if plan.calibration is not None:
        overlap = find_overlap(plan.calibration.texts, plan.all_sets)
    found = []
    for name in plan.names:
        spec = plan.policy.variants[name]
        is_calibrated = spec.scheme in CALIBRATED_SCHEMES and spec.path is None
        found.append(
            Preflight(
                variant=name,
                kernel=kernel_of(spec, device=plan.device),
                problems=() if spec.path else tuple(_problems(spec, widths, device=plan.device)),
                overlap=overlap if is_calibrated else None,
            )
        )
    return found


def linear_widths(
    shapes: Mapping[str, tuple[int, ...]], *, vocabulary: int
) -> dict[str, tuple[int, int]]:
    """[out, in] of each matrix that quantizers replace: all but those with a row per token id."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != vocabulary
    }


def kernel_of(spec: VariantSpec, *, device: str) -> str:
    """The kernel that the server selects for a scheme on a device, in words."""
    is_cuda = device.startswith("cuda")
    if spec.scheme == "bf16":
        return "torch matmul in BF16" if is_cuda else "torch matmul in FP32 on BF16 weights"
    if spec.scheme == "int8-bnb":
        return "bitsandbytes LLM.int8" + ("" if is_cuda else ", CPU")
    if spec.scheme == "int4-nf4":
        return "bitsandbytes 4-bit" + ("" if is_cuda else ", CPU")
    if not is_cuda:
        return "torch, codes expanded to FP32"
    group_size = spec.group_size or DEFAULT_GROUP_SIZE
    if group_size in _MARLIN_GROUPS and spec.options.get("sym", True):
        return "Machete or Marlin (symmetric, group size " + f"{group_size})"
    return "Triton or torch: Marlin takes symmetric weights in groups of 32, 64 or 128"


def _problems(
    spec: VariantSpec, widths: Mapping[str, tuple[int, int]], *, device: str
) -> list[str]:
    problems = [f"option {key!r} is not known" for key in _unknown_options(spec)]
    if spec.scheme in CALIBRATED_SCHEMES:
        group_size = spec.group_size or DEFAULT_GROUP_SIZE
        narrow = [name for name, (_, width) in widths.items() if width % group_size]
        if narrow:
            problems.append(
                f"group_size {group_size} does not divide the inputs of {len(narrow)} modules "
                f"(first {narrow[0]}, {widths[narrow[0]][1]} inputs); choose one that does, such "
                f"as {_largest_divisor(widths)}"
            )
    if spec.scheme == "int4-nf4" and not device.startswith("cuda"):
        odd = [name for name, (_, width) in widths.items() if width % NF4_BLOCK]
        if odd:
            problems.append(
                f"bitsandbytes' CPU kernel misreads NF4 where rows are no multiple of {NF4_BLOCK} "
                f"({len(odd)} modules, first {odd[0]}, {widths[odd[0]][1]} inputs): weights come "
                "out with a relative error of 0.3 instead of 0.1. Serve it on CUDA, or use "
                "int4-gptq"
            )
    return problems


_OPTIONS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8-bnb": ("llm_int8_threshold", "skip_modules"),
    "int4-nf4": ("double_quant", "skip_modules"),
    "int8-gptq": ("batch_size",),
    "int4-gptq": ("batch_size",),
}


def _unknown_options(spec: VariantSpec) -> list[str]:
    known: tuple[str, ...] = _OPTIONS[spec.scheme]
    return [key for key in spec.options if key not in known]


def _largest_divisor(widths: Mapping[str, tuple[int, int]]) -> Any:
    sizes = [size for size in (128, 64, 32, 16) if all(w % size == 0 for _, w in widths.values())]
    return sizes[0] if sizes else "none of 16 to 128; use int4-nf4"
