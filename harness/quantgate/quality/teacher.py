"""Teacher-forced comparison with the reference: the child process that holds both models.

`python -m quantgate.quality.teacher REQUEST.json` scores the same token ids under the reference and
under each candidate, through the loader the server uses, and writes one parquet per candidate as
soon as it is done. KL is KL(reference || candidate) in nats, FP32, over the full vocabulary.

Shapes: T tokens of one document, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.files import sha256_of_file, sha256_of_json, write_with
from quantgate.quality.healthy import make_healthy
from quantgate_serve.imports import UNUSED_BY_MODELS, uncollected, without

if TYPE_CHECKING:
    from torch import Tensor

    from quantgate_serve.offline import LoadedModel


def main() -> None:
    with without(*UNUSED_BY_MODELS), uncollected():
        import torch

        from quantgate_serve import offline

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    device = request["device"]
    documents: list[dict[str, Any]] = request["documents"]
    load = partial(
        offline.load_model,
        device=device,
        dtype=request["dtype"],
        max_context=request["max_context"],
    )
    folder = Path(request["reference"])
    reference = _Reference(load(folder), [d["ids"] for d in documents])
    # Twins of one scheme are the same model, and a few numbers a document are all that is kept.
    healthy: dict[tuple[str, int], list[Tensor]] = {}
    for candidate in request["candidates"]:
        started = time.perf_counter()
        model = load(Path(candidate["folder"]))
        kind = (candidate["scheme"], candidate["group_size"])
        twin = None
        if kind not in healthy:
            twin = load(folder)
            make_healthy(twin.model, candidate["scheme"], group_size=candidate["group_size"])
            healthy[kind] = []
        rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for index, document in enumerate(documents):
            ids = document["ids"]
            expected, found = reference.of(index), offline.logits(model, ids)
            compared = compare(expected, found) | best_tokens(found)
            if twin is not None:
                healthy[kind].append(divergence(expected, offline.logits(twin, ids)))
            compared["healthy_kl_nats"] = healthy[kind][index]
            count = len(ids) - 1
            rows["document"] += [document["id"]] * count
            rows["tags"] += [document["tags"]] * count
            rows["position"] += range(1, count + 1)
            rows["token_id"] += ids[1:]
            for name, values in compared.items():
                rows[name] += values.tolist()
        write_with(Path(candidate["out"]), partial(pq.write_table, pa.table(rows, SCHEMA)))
        seconds = time.perf_counter() - started
        print(f"{candidate['name']}: {len(rows['position'])} tokens in {seconds:.1f} s", flush=True)
        del model, twin


class _Reference:
    """What the reference says of each document: once, where it fits in memory for the others."""

    def __init__(self, loaded: LoadedModel, documents: list[list[int]]) -> None:
        self._loaded = loaded
        self._documents = documents
        self._kept: dict[int, Expected] = {}
        self._num_free_bytes = _MAX_KEPT_BYTES

    def of(self, index: int) -> Expected:
        """Of one document, computed or kept."""
        from quantgate_serve import offline

        kept = self._kept.get(index)
        if kept is not None:
            return kept
        ids = self._documents[index]
        found = expect(offline.logits(self._loaded, ids), ids)
        if found.log_probs.nbytes <= self._num_free_bytes:
            self._num_free_bytes -= found.log_probs.nbytes
            self._kept[index] = found
        return found


_MAX_KEPT_BYTES = 2**30
_ROWS_AT_ONCE = 32
SCHEMA = pa.schema(
    {
        "document": pa.string(),
        "tags": pa.list_(pa.string()),
        "position": pa.int32(),
        "kl_nats": pa.float64(),
        "healthy_kl_nats": pa.float64(),
        "is_top1_equal": pa.bool_(),
        "reference_margin": pa.float64(),
        "reference_nll_nats": pa.float64(),
        "candidate_nll_nats": pa.float64(),
        "is_finite": pa.bool_(),
        "token_id": pa.int32(),
        "candidate_top_ids": pa.list_(pa.int32()),
        "candidate_top_log_probs": pa.list_(pa.float32()),
    }
)
"""`position` is that of the predicted token, `token_id` what it is; `reference_margin` is the
probability of the reference's first choice less that of its second; `healthy_kl_nats` is the
healthy twin's KL; the candidate's most likely tokens are what the server is compared with."""
NUM_TOP = 16
COLUMNS = tuple(SCHEMA.names)


@cache
def teacher_sha256() -> str:
    """The version of what is compared, and how: the digest of its code."""
    return sha256_of_json(
        [sha256_of_file(Path(__file__)), sha256_of_file(Path(__file__).with_name("healthy.py"))]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The reference's next-token distributions at every position that has a next token."""

    num_tokens: int
    next_ids: Tensor
    """[T - 1, 1]."""
    log_probs: Tensor
    """[T - 1, V], FP32."""
    is_finite: Tensor
    """[T - 1]: whether the logits were."""
    top1: Tensor
    margin: Tensor


def expect(logits: Tensor, ids: list[int]) -> Expected:
    """What is compared with each candidate: from the reference's logits [T, V] on `ids`."""
    import torch

    log_probs = torch.log_softmax(logits[:-1].float(), dim=-1)
    top = log_probs.exp().topk(min(2, logits.shape[-1]), dim=-1).values
    return Expected(
        num_tokens=len(logits),
        next_ids=torch.tensor(ids[1:], device=logits.device).unsqueeze(1),
        log_probs=log_probs,
        is_finite=torch.isfinite(logits[:-1]).all(-1),
        top1=log_probs.argmax(-1),
        margin=top[:, 0] - top[:, -1],
    )


def compare(expected: Expected, candidate: Tensor) -> dict[str, Tensor]:
    """Compares next-token distributions at every position that has a next token.

    Args:
        candidate: [T, V'] logits on the same token ids; V' other than V is an error, never cut to
            fit.

    Returns:
        [T - 1] tensors by column name. KL is clamped at 0, since rounding can make it slightly
        negative; where a logit is not finite, KL and NLL are 0 and `is_finite` is False.

    Raises:
        ValueError: the vocabularies differ.
    """
    import torch

    log_probs, kl = _log_probs_and_divergence(expected, candidate)
    is_finite = expected.is_finite & torch.isfinite(candidate[:-1]).all(-1)
    columns = {
        "kl_nats": kl,
        "reference_nll_nats": -expected.log_probs.gather(1, expected.next_ids).squeeze(1),
        "candidate_nll_nats": -log_probs.gather(1, expected.next_ids).squeeze(1),
        "reference_margin": expected.margin,
    }
    zero = torch.zeros_like(kl)
    cleaned = {name: torch.where(is_finite, value, zero) for name, value in columns.items()}
    return cleaned | {
        "is_top1_equal": expected.top1 == log_probs.argmax(-1),
        "is_finite": is_finite,
    }


def divergence(expected: Expected, candidate: Tensor) -> Tensor:
    """`kl_nats` of `compare` alone."""
    import torch

    _, kl = _log_probs_and_divergence(expected, candidate)
    is_finite = expected.is_finite & torch.isfinite(candidate[:-1]).all(-1)
    return torch.where(is_finite, kl, torch.zeros_like(kl))


def _log_probs_and_divergence(expected: Expected, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate's log-probabilities [T - 1, V], and KL(reference || candidate) [T - 1]."""
    import torch

    shape = (expected.num_tokens, expected.log_probs.shape[-1])
    if candidate.shape != shape:
        raise ValueError(
            f"logits are {tuple(candidate.shape)}, the reference's {shape}: the "
            "candidate's vocabulary was truncated or extended."
        )
    p = expected.log_probs
    q = torch.log_softmax(candidate[:-1].float(), dim=-1)
    kl = torch.empty(len(q), device=q.device)
    # A few rows at a time stay in the core's cache, and no product of whole tables is ever held.
    for start in range(0, len(q), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        kl[rows] = (p[rows].exp() * (p[rows] - q[rows])).sum(-1)
    return q, kl.clamp_min_(0.0)


def best_tokens(logits: Tensor) -> dict[str, Tensor]:
    """The most likely next tokens of each position that has a next token.

    Args:
        logits: [T, V].

    Returns:
        [T - 1, NUM_TOP] ids and FP32 log-probabilities, fewer where V is smaller.
    """
    import torch

    rows = logits[:-1].float()
    top = rows.topk(min(NUM_TOP, rows.shape[-1]), dim=-1)
    log_probs = top.values - torch.logsumexp(rows, dim=-1, keepdim=True)
    return {"candidate_top_ids": top.indices, "candidate_top_log_probs": log_probs}


if __name__ == "__main__":
    main()
