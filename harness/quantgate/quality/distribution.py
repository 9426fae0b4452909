"""KL, top-1 agreement and perplexity against the reference: runs the teacher, reduces its rows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.files import write_json
from quantgate.measure import Clustered, Measurement, Missing, Scalar
from quantgate.quality.rendering import RenderedPrompt
from quantgate.server import last_lines

_POLL_S = 0.2

METRICS = (
    "quality/kl_nats.mean",
    "quality/kl_nats.p99",
    "quality/top1_agreement.rate",
    "quality/perplexity.ratio",
    "quality/non_finite.count",
)


def compare_with_reference(
    reference: Path,
    candidates: Mapping[str, Path],
    documents: Sequence[RenderedPrompt],
    *,
    out: Mapping[str, Path],
    log: Path,
    device: str,
    dtype: str,
    threads: int | None,
    max_tokens: int,
    on_done: Callable[[str], None],
) -> dict[str, str]:
    """Scores each candidate in a child process and writes its parquet to `out[name]`.

    A candidate that ends the process is left out and the others go on.

    Returns:
        Why there is no result, by candidate; empty when all were scored.
    """
    failures: dict[str, str] = {}
    pending = dict(candidates)

    def take_finished() -> None:
        for name in [name for name in pending if out[name].is_file()]:
            del pending[name]
            on_done(name)

    while pending:
        code = _run_teacher(
            reference, dict(pending), documents, out=out, log=log, device=device, dtype=dtype,
            threads=threads, max_tokens=max_tokens, take_finished=take_finished,
        )  # fmt: skip
        if pending:
            # Candidates are taken in order, so the first without a result is the one that failed.
            name = next(iter(pending))
            del pending[name]
            failures[name] = f"teacher-forced scoring failed (exit {code}):\n{last_lines(log)}"
    return failures


def reduce_distribution(path: Path, *, source: str) -> list[Measurement]:
    """Reduces one candidate's rows to measurements, clustered by document.

    Raises:
        MeasurementError: the file holds no rows.
    """
    table = pq.read_table(path)
    if table.num_rows == 0:
        raise MeasurementError(f"{path}: no tokens were compared.")
    kl = table["kl_nats"].to_numpy()
    finite = table["is_finite"].to_numpy()
    agree = table["is_top1_equal"].to_numpy()
    nll = table["candidate_nll_nats"].to_numpy() - table["reference_nll_nats"].to_numpy()
    documents = np.asarray(table["document"].to_pylist())
    _, index = np.unique(documents, return_inverse=True)
    num_non_finite = int((~finite).sum())
    counted = Scalar(
        metric="quality/non_finite.count",
        value=num_non_finite,
        unit="count",
        n=table.num_rows,
        source=source,
    )
    if num_non_finite:
        reason = f"{num_non_finite} of {table.num_rows} positions have non-finite logits"
        others = [m for m in METRICS if m != counted.metric]
        return [counted, *(Missing(metric=m, reason=reason, source=source) for m in others)]
    counts = tuple(int(c) for c in np.bincount(index))
    return [
        Clustered(
            metric="quality/kl_nats.mean",
            unit="nats",
            totals=tuple(np.bincount(index, weights=kl)),
            counts=counts,
            source=source,
        ),
        Scalar(
            metric="quality/kl_nats.p99",
            value=float(np.percentile(kl, 99, method="inverted_cdf")),
            unit="nats",
            n=table.num_rows,
            source=source,
        ),
        # Tokens of one document are not independent, so agreement is clustered like KL.
        Clustered(
            metric="quality/top1_agreement.rate",
            unit="1",
            totals=tuple(np.bincount(index, weights=agree.astype(float))),
            counts=counts,
            source=source,
        ),
        Clustered(
            metric="quality/perplexity.ratio",
            unit="x",
            totals=tuple(np.bincount(index, weights=nll)),
            counts=counts,
            transform="exp",
            paired=True,
            source=source,
        ),
        counted,
    ]


def _run_teacher(
    reference: Path,
    candidates: Mapping[str, Path],
    documents: Sequence[RenderedPrompt],
    *,
    out: Mapping[str, Path],
    log: Path,
    device: str,
    dtype: str,
    threads: int | None,
    max_tokens: int,
    take_finished: Callable[[], None],
) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantgate-") as temporary:
        request = Path(temporary) / "request.json"
        write_json(
            request,
            {
                "reference": str(reference),
                "candidates": [
                    {"name": name, "folder": str(folder), "out": str(out[name])}
                    for name, folder in candidates.items()
                ],
                "documents": [
                    {"id": d.item.cluster, "ids": list(d.ids[:max_tokens])} for d in documents
                ],
                "device": device,
                "dtype": dtype,
                "threads": threads,
            },
        )
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "quantgate.quality.teacher", str(request)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Threads that spin at a barrier starve each other where cores are shared.
                env={"GOMP_SPINCOUNT": "10000"} | os.environ,
            )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                take_finished()
        finally:
            process.kill()
            code = process.wait()
    take_finished()
    return code
