"""Where a variant's comparison with the reference is kept: by what it depends on, never by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.files import sha256_of_json
from quantgate.machine import processor_of
from quantgate.policy import SOURCE
from quantgate.quality.stage import engine_sha256
from quantgate.quality.teacher import teacher_sha256
from quantgate.variants.build import Variant
from quantgate.variants.scheme import DEFAULT_GROUP_SIZE, quantization_settings

if TYPE_CHECKING:
    from quantgate.plan import Plan

_WHOLE_ROW = 2**30
"""Longer than any row; AutoGPTQ writes -1."""


def distribution_paths(
    plan: Plan, variants: Mapping[str, Variant], built: Mapping[str, Variant], *, store: Path
) -> dict[str, Path]:
    """The parquet of each of `variants`, whether it exists or not; none without documents.

    Args:
        variants: by their name in the policy.
        built: where the reference is found, if the policy names a variant.
    """
    if plan.policy.distribution is None or plan.documents is None:
        return {}
    reference_sha256 = plan.source.sha256
    if plan.policy.reference != SOURCE:
        reference_sha256 = built[plan.policy.reference].manifest.artifact_sha256
    paths = {}
    for name, variant in variants.items():
        key = sha256_of_json(
            {
                "reference": reference_sha256,
                "candidate": variant.manifest.artifact_sha256,
                "items": plan.documents.items_sha256,
                "max_tokens": plan.policy.distribution.max_tokens,
                "dtype": plan.dtype,
                "device": plan.device,
                "threads": plan.server.threads,
                "engine": engine_sha256(),
                "processor": processor_of(plan.device),
                "teacher": teacher_sha256(),
                "scheme": variant.manifest.scheme,
                "group_size": group_size_of(plan, name, variant.folder),
            }
        )
        paths[name] = store / f"distribution-{key[:24]}.parquet"
    return paths


def group_size_of(plan: Plan, name: str, folder: Path) -> int:
    """Inputs that share a scale in a variant, and so in its healthy twin; all of a row for many.

    Of an artifact that somebody brought it is what its own config says, unless the policy does.
    """
    spec = plan.policy.variants[name]
    if spec.group_size is not None or spec.path is None:
        return spec.group_size or DEFAULT_GROUP_SIZE
    found = quantization_settings(folder).get("group_size", DEFAULT_GROUP_SIZE)
    return found if isinstance(found, int) and found > 0 else _WHOLE_ROW
