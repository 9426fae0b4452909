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
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.files import sha256_of_file, sha256_of_json, write_with
from quantgate.quality.healthy import make_healthy

if TYPE_CHECKING:
    from torch import Tensor

    from quantgate_serve.offline import LoadedModel


def main() -> None:
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
            expected, found = reference.logits(index), offline.logits(model, ids)
            compared = compare_logits(expected, found, ids) | best_tokens(found)
            if twin is not None:
                rounded = compare_logits(expected, offline.logits(twin, ids), ids)
                healthy[kind].append(rounded["kl_nats"])
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
    """The reference's logits: computed once, where they fit in memory for the next candidate."""

    def __init__(self, loaded: LoadedModel, documents: list[list[int]]) -> None:
        self._loaded = loaded
        self._documents = documents
        self._kept: dict[int, Tensor] = {}
        self._num_free_bytes = _MAX_KEPT_BYTES

    def logits(self, index: int) -> Tensor:
        """[T, V] of one document, FP32."""
        from quantgate_serve import offline

        kept = self._kept.get(index)
        if kept is not None:
            return kept
        found = offline.logits(self._loaded, self._documents[index])
        if found.nbytes <= self._num_free_bytes:
            self._num_free_bytes -= found.nbytes
            self._kept[index] = found
        return found


_MAX_KEPT_BYTES = 2**30
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


def compare_logits(reference: Tensor, candidate: Tensor, ids: list[int]) -> dict[str, Tensor]:
    """Compares next-token distributions at every position that has a next token.

    Args:
        reference: [T, V] logits.
        candidate: [T, V'] logits; V' other than V is an error, never cut to fit.
        ids: the T token ids both were computed on.

    Returns:
        [T - 1] tensors by column name. KL is clamped at 0, since rounding can make it slightly
        negative; where a logit is not finite, KL and NLL are 0 and `is_finite` is False.

    Raises:
        ValueError: the vocabularies differ.
    """
    import torch

    if reference.shape != candidate.shape:
        raise ValueError(
            f"logits are {tuple(candidate.shape)}, the reference's {tuple(reference.shape)}: the "
            "candidate's vocabulary was truncated or extended."
        )
    next_ids = torch.tensor(ids[1:], device=reference.device).unsqueeze(1)
    p = torch.log_softmax(reference[:-1].float(), dim=-1)
    q = torch.log_softmax(candidate[:-1].float(), dim=-1)
    is_finite = torch.isfinite(reference[:-1]).all(-1) & torch.isfinite(candidate[:-1]).all(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
    columns = {
        "kl_nats": kl,
        "reference_nll_nats": -p.gather(1, next_ids).squeeze(1),
        "candidate_nll_nats": -q.gather(1, next_ids).squeeze(1),
    }
    top = p.exp().topk(min(2, p.shape[-1]), dim=-1).values
    columns["reference_margin"] = top[:, 0] - top[:, -1]
    zero = torch.zeros_like(kl)
    cleaned = {name: torch.where(is_finite, value, zero) for name, value in columns.items()}
    return cleaned | {
        "is_top1_equal": p.argmax(-1) == q.argmax(-1),
        "is_finite": is_finite,
    }


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
