"""Audits one artifact: every weight against the source's, and what stands beside them."""

from __future__ import annotations

import time
from pathlib import Path

from quantgate.audit import gptq, llm_int8, nf4, plain
from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.comparison import compare_weight
from quantgate.audit.declared import (
    Declaration,
    ModelOutline,
    eligible_modules,
    read_declaration,
)
from quantgate.audit.report import AuditReport, WeightAudit
from quantgate.audit.sidecars import differing_config, differing_files, vocabulary_problems
from quantgate.audit.stored import CannotDequantize, StoredWeight
from quantgate.variants.manifest import VariantManifest
from quantgate.variants.scheme import CALIBRATED_SCHEMES
from quantgate.variants.source import SourceModel

_WAYS = {
    "gptq": ("qweight", gptq.PARTS),
    "nf4": (nf4.STATE, nf4.PARTS),
    "int8": ("SCB", llm_int8.PARTS),
}
"""How a quantized weight is stored: the tensor that shows it, and all that belong to it."""
_TOLERATES_INT8 = ("int4-nf4", "int4-gptq")
"""Schemes in which 8 bits for what is not quantized add nothing that shows beside 4."""


def audit_artifact(
    source: SourceModel, outline: ModelOutline, folder: Path, manifest: VariantManifest
) -> AuditReport:
    """Reads every weight of the source and of the artifact once.

    Args:
        outline: of the source's model, which all its variants share.

    Raises:
        ArtifactError: a file of either cannot be read.
    """
    started = time.perf_counter()
    declaration = read_declaration(folder, manifest.scheme)
    with Checkpoint(source.folder) as original, Checkpoint(folder) as stored:
        weights = _Weights(
            source=original,
            stored=stored,
            outline=outline,
            declaration=declaration,
            is_quantizing=manifest.scheme != "bf16",
            tolerates_int8=manifest.scheme in _TOLERATES_INT8,
            is_calibrated=manifest.scheme in CALIBRATED_SCHEMES,
        )
        weights.compare_all()
        vocabulary = vocabulary_problems(source, folder, stored, outline)
        source_bytes = sum(tensor.num_bytes for tensor in original.tensors.values())
    configs = differing_config(source, folder)
    if manifest.source_sha256 not in (None, source.sha256):
        configs.append("variant.json: it was built from another source model")
    return AuditReport(
        scheme=manifest.scheme,
        artifact_sha256=manifest.artifact_sha256,
        source_sha256=source.sha256,
        is_calibrated=manifest.scheme in CALIBRATED_SCHEMES,
        calibration_tokens=manifest.calibration.num_tokens if manifest.calibration else None,
        calibration_surprise=manifest.notes.get("calibration_surprise"),
        weights=tuple(weights.audits),
        bits_per_weight=weights.bits_per_weight,
        coverage=tuple(weights.coverage),
        formats=(*declaration.problems, *weights.formats),
        configs=tuple(configs),
        files=tuple(differing_files(source, folder)),
        vocabulary=tuple(vocabulary),
        source_bytes=source_bytes,
        seconds=time.perf_counter() - started,
    )


class _Weights:
    """Walks through the source's tensors and finds what the artifact made of each."""

    def __init__(
        self,
        *,
        source: Checkpoint,
        stored: Checkpoint,
        outline: ModelOutline,
        declaration: Declaration,
        is_quantizing: bool,
        tolerates_int8: bool,
        is_calibrated: bool,
    ) -> None:
        self.audits: list[WeightAudit] = []
        self.coverage: list[str] = []
        self.formats: list[str] = []
        self._source = source
        self._stored = stored
        self._outline = outline
        self._declaration = declaration
        self._is_quantizing = is_quantizing
        self._tolerates_int8 = tolerates_int8
        self._is_calibrated = is_calibrated
        self._eligible = eligible_modules(outline, source)
        self._num_bits = 0
        self._num_eligible = 0
        self._seen: set[str] = set()

    @property
    def bits_per_weight(self) -> float | None:
        return self._num_bits / self._num_eligible if self._num_eligible else None

    def compare_all(self) -> None:
        for name in sorted(self._source.tensors):
            self._compare(name, source_name=name)
        self._compare_untied_head()
        unknown = sorted(self._stored.tensors.keys() - self._seen)
        self.coverage += [f"{name} is in the artifact and not in the source" for name in unknown]

    def _compare(self, name: str, *, source_name: str) -> None:
        module = name.removesuffix(".weight")
        how = self._how_stored(name, module)
        is_eligible = module in self._eligible and name.endswith(".weight")
        self._check_coverage(name, module, how, is_eligible)
        if how is None:
            return
        shape = self._source[source_name].shape
        try:
            weight = self._open(name, module, how, shape)
        except CannotDequantize as error:
            self.formats.append(f"{module}: {error}")
            return
        self.formats += [f"{module}: {problem}" for problem in weight.problems]
        if is_eligible:
            self._num_bits += weight.num_bits
            self._num_eligible += self._source[source_name].num_elements
        self._check_buffer(name)
        self.audits.append(
            compare_weight(
                source_name,
                self._source,
                weight,
                shape=shape,
                is_quantized=how != "plain",
                counts_nearest=self._is_calibrated and how == "gptq",
            )
        )

    def _how_stored(self, name: str, module: str) -> str | None:
        """`gptq`, `nf4`, `int8`, `plain`, or None when the artifact has no such weight."""
        if name.endswith(".weight"):
            for how, (mark, parts) in _WAYS.items():
                if f"{module}.{mark}" in self._stored:
                    self._seen.update(f"{module}.{part}" for part in parts)
                    return how
        if name not in self._stored:
            return None
        self._seen.add(name)
        return "plain"

    def _open(self, name: str, module: str, how: str, shape: tuple[int, ...]) -> StoredWeight:
        if how == "plain":
            return plain.read_weight(self._stored, name, shape, tolerates_int8=self._tolerates_int8)
        if len(shape) != 2:
            raise CannotDequantize(f"is quantized, and the source's has shape {shape}")
        matrix = (shape[0], shape[1])
        if how == "gptq":
            return gptq.read_weight(
                self._stored, module, gptq.read_format(self._declaration.settings), matrix
            )
        if how == "nf4":
            return nf4.read_weight(self._stored, module, matrix)
        return llm_int8.read_weight(self._stored, module, matrix)

    def _check_coverage(self, name: str, module: str, how: str | None, is_eligible: bool) -> None:
        if how is None:
            is_tied = module == self._outline.head and self._has_embedding()
            if not is_tied and name not in self._outline.buffers:
                self.coverage.append(f"{name} is missing")
        elif is_eligible and self._is_quantizing and how == "plain":
            if not self._declaration.skips(module):
                self.coverage.append(f"{module} is not quantized")
        elif how != "plain" and not (is_eligible and self._is_quantizing):
            self.coverage.append(f"{module} is quantized, and should have been left alone")

    def _check_buffer(self, name: str) -> None:
        if name not in self._outline.buffers and not name.endswith("inv_freq"):
            return
        stored, original = self._stored[name].dtype, self._source[name].dtype
        if stored.itemsize < original.itemsize:
            self.formats.append(
                f"{name} is stored as {stored}; computed tables need {original}, or positions "
                "far apart become the same"
            )

    def _compare_untied_head(self) -> None:
        """A tied head that the artifact stores all the same must be the embedding."""
        head, embedding = self._outline.head, self._outline.input_embedding
        if head is None or embedding is None or f"{head}.weight" in self._source:
            return
        if any(key.startswith(f"{head}.") for key in self._stored.tensors):
            self._compare(f"{head}.weight", source_name=f"{embedding}.weight")

    def _has_embedding(self) -> bool:
        return f"{self._outline.input_embedding}.weight" in self._stored
