"""What one path through a model says of the tokens of documents, and how far two paths differ.

A path is offline scoring or the server. At each position it names the log-probability of the token
that follows and those of its most likely tokens; the rest of the vocabulary is one lump.

Shapes: N positions of all documents, K named tokens, the one that follows among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.files import write_with

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

SCHEMA = pa.schema(
    {
        "document": pa.string(),
        "tags": pa.list_(pa.string()),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "log_prob": pa.float64(),
        "top_ids": pa.list_(pa.int32()),
        "top_log_probs": pa.list_(pa.float32()),
    }
)
"""`position` is that of the token that follows; its log-probability is `log_prob`."""

# Below this a mass is rounding of FP32 log-probabilities near 0: 2^-24 a token, of a dozen tokens.
_SMALLEST_MASS = 1e-6
# Ids that no token has, and that differ, so that they never count as the same token.
_NONE_HERE, _NONE_THERE = -1, -2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    """The rows of one path, in the order of documents and positions."""

    documents: npt.NDArray[Any]
    tags: list[list[str]]
    positions: IntArray
    token_ids: IntArray
    log_probs: FloatArray
    top_ids: IntArray
    """[N, K - 1], most likely first."""
    top_log_probs: FloatArray

    @classmethod
    def of(cls, table: pa.Table) -> ScoredTokens:
        """From the columns of SCHEMA."""
        count = table.num_rows
        return cls(
            documents=np.asarray(table["document"].to_pylist(), dtype=np.str_),
            tags=table["tags"].to_pylist(),
            positions=table["position"].to_numpy().astype(np.int64),
            token_ids=table["token_id"].to_numpy().astype(np.int64),
            log_probs=table["log_prob"].to_numpy(),
            top_ids=_rows(table["top_ids"], count).astype(np.int64),
            top_log_probs=_rows(table["top_log_probs"], count).astype(np.float64),
        )

    def __len__(self) -> int:
        return len(self.positions)

    def named(self, nobody: int) -> tuple[IntArray, FloatArray]:
        """[N, K] ids and log-probabilities; `nobody` for the second naming of what follows."""
        is_twice = self.top_ids == self.token_ids[:, None]
        ids = np.where(is_twice, nobody, self.top_ids)
        return (
            np.concatenate([self.token_ids[:, None], ids], axis=1),
            np.concatenate([self.log_probs[:, None], self.top_log_probs], axis=1),
        )


def read_scored_tokens(path: Path) -> ScoredTokens:
    return ScoredTokens.of(pq.read_table(path))


def write_scored_tokens(path: Path, rows: dict[str, list[Any]]) -> None:
    """Columns of SCHEMA, as lists."""
    write_with(path, partial(pq.write_table, pa.table(rows, SCHEMA)))


def compare_paths(first: ScoredTokens, second: ScoredTokens) -> pa.Table:
    """The difference of two paths in the teacher's columns, with `first` as the reference.

    `kl_nats` is a lower bound of KL(first || second): KL of the tokens that both name and of the
    rest as one token, since no merging of outcomes raises KL (the data processing inequality).
    What it cannot see is how the rest is spread; `rest` is that share of `first`. FP32 rounding of
    the named tokens is 1e-6 nats a position at most.

    Raises:
        MeasurementError: they are not about the same tokens.
    """
    for name in ("documents", "positions", "token_ids"):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise MeasurementError(f"the two paths did not score the same tokens ({name} differ)")
    ids, log_p = first.named(_NONE_HERE)
    other_ids, other_log_q = second.named(_NONE_THERE)
    is_same = ids[:, :, None] == other_ids[:, None, :]
    is_shared = is_same.any(axis=2)
    log_q = np.take_along_axis(other_log_q, is_same.argmax(axis=2), axis=1)
    is_finite = np.isfinite(np.concatenate([log_p, other_log_q], axis=1)).all(axis=1)
    is_used = is_shared & is_finite[:, None]
    log_p, log_q = np.where(is_used, log_p, 0.0), np.where(is_used, log_q, 0.0)
    p, q = np.where(is_used, np.exp(log_p), 0.0), np.where(is_used, np.exp(log_q), 0.0)
    rest = np.maximum(1.0 - p.sum(axis=1), _SMALLEST_MASS)
    other_rest = np.maximum(1.0 - q.sum(axis=1), _SMALLEST_MASS)
    kl = (p * (log_p - log_q)).sum(axis=1) + rest * np.log(rest / other_rest)
    zero = np.zeros(len(first))
    return pa.table(
        {
            "document": first.documents,
            "tags": pa.array(first.tags, pa.list_(pa.string())),
            "position": first.positions,
            "kl_nats": np.where(is_finite, np.maximum(kl, 0.0), zero),
            "healthy_kl_nats": zero,
            "is_top1_equal": first.top_ids[:, 0] == second.top_ids[:, 0],
            "reference_margin": np.where(is_finite, _margin(first.top_log_probs), zero),
            "reference_nll_nats": np.where(is_finite, -first.log_probs, zero),
            "candidate_nll_nats": np.where(is_finite, -second.log_probs, zero),
            "is_finite": is_finite,
            "rest": np.where(is_finite, rest, zero),
        }
    )


def _margin(top_log_probs: FloatArray) -> FloatArray:
    """The probability of the first choice less that of the second, if there is one."""
    best = np.exp(top_log_probs[:, :2])
    margin: FloatArray = best[:, 0] - best[:, -1]
    return margin


def _rows(column: pa.ChunkedArray, count: int) -> npt.NDArray[Any]:
    """[count, K] from lists of equal length."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if count == 0 or len(flat) % count:
        raise MeasurementError("not the same number of likely tokens at each position")
    rows: npt.NDArray[Any] = flat.reshape(count, -1)
    return rows
