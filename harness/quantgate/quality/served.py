"""Served = offline: the server scores documents in batches, and must say what offline scoring said.

The server echoes prompts with log-probabilities; nothing is generated. A difference beyond rounding
is a fault of the serving path (batching, KV pages, positions, padding), whatever the weights are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.files import sha256_of_file, sha256_of_json
from quantgate.machine import processor_of
from quantgate.measure import Clustered, ClusteredRatio, Measurement, Missing, Scalar
from quantgate.policy import Policy, required_gates
from quantgate.quality.completions import (
    FULL_BATCHES,
    UNEXPECTED,
    Batching,
    CompletionClient,
    complete_each,
)
from quantgate.quality.rendering import RenderedPrompt
from quantgate.quality.scored_tokens import (
    SCHEMA,
    FloatArray,
    ScoredTokens,
    compare_paths,
    read_scored_tokens,
    write_scored_tokens,
)
from quantgate.quality.stage import ServedModel, engine_sha256
from quantgate.server_pool import ServerPool

RELATIVE = "quality/served_logprob_difference_nats.reference.ratio"
OWN_NOISE = "quality/served_logprob_difference_nats.itself.ratio"
"""Of variants that are asked a second time in other batches, which a gate on it does."""
METRICS = (
    "quality/served_kl_nats.mean",
    "quality/served_kl_nats.max",
    "quality/served_logprob_difference_nats.mean",
    "quality/served_logprob_difference_nats.max",
    RELATIVE,
    OWN_NOISE,
)
RESOLUTION_NATS = 1e-6
"""FP32 log-probabilities of a dozen nats are so far apart; a smaller difference counts as this."""
NUM_TOP = 8
"""Likely tokens named at each position; offline scoring names twice as many, so that those of the
server are among them also where near-ties change places."""


def measure_served(
    model: ServedModel,
    documents: Sequence[RenderedPrompt],
    *,
    max_tokens: int,
    store: Path,
    log: Path,
    servers: ServerPool,
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching = FULL_BATCHES,
) -> Path:
    """Scores the documents' tokens through the server, unless the store has them.

    Returns:
        A parquet of scored tokens.

    Raises:
        MeasurementError: the server died, or did not score a document.
    """
    asked = [(d.item.cluster, sorted(d.item.tags), list(d.ids[:max_tokens])) for d in documents]
    key = sha256_of_json(
        {
            "artifact": model.artifact_sha256,
            "documents": asked,
            "engine": engine_sha256(),
            "processor": processor_of(servers.options.device),
            "server": servers.options.arguments(),
            "batching": asdict(batching),
            "scoring": _scoring_sha256(),
        }
    )
    path = store / f"served-{key[:24]}.parquet"
    if path.is_file():
        on_answers(len(asked))
        return path
    with servers.serving(model.folder, log=log) as server:
        prompts = [ids for _, _, ids in asked]
        scored = asyncio.run(_score_all(server.url, prompts, timeout_s, on_answers, batching))
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for (document, tags, ids), columns in zip(asked, scored, strict=True):
        count = len(ids) - 1
        rows["document"] += [document] * count
        rows["tags"] += [tags] * count
        rows["position"] += range(1, count + 1)
        rows["token_id"] += ids[1:]
        for name, values in columns.items():
            rows[name] += values
    write_scored_tokens(path, rows)
    return path


def is_asked_twice(policy: Policy, name: str) -> bool:
    """Whether a variant has a gate on how far it is from itself; the source has none."""
    return name in policy.variants and any(
        gate.metric == OWN_NOISE for gate in required_gates(policy, name)
    )


def reduce_served(
    distribution: Path, served: Path, *, reference: Path | None, again: Path | None, source: str
) -> list[Measurement]:
    """Compares what a variant's server said with what offline scoring said of the same tokens.

    Args:
        reference: what the reference's server said of them; None where it said nothing.
        again: what the variant's server said in other batches; None where it was asked once.

    Raises:
        MeasurementError: they did not score the same tokens.
    """
    said = read_scored_tokens(served)
    table = compare_paths(offline_tokens(distribution), said)
    is_finite = table["is_finite"].to_numpy()
    if not is_finite.all():
        reason = f"{(~is_finite).sum()} of {len(is_finite)} positions have non-finite logits"
        return missing_served(reason, source=source)
    return [
        *reduce_difference(table, "served", source=source),
        _in_units_of_reference(distribution, said, reference, source=source),
        _in_units_of_itself(distribution, said, again, source=source),
    ]


def _in_units_of_reference(
    distribution: Path, served: ScoredTokens, reference: Path | None, *, source: str
) -> Measurement:
    """How far served is from offline, in units of how far it is for the reference.

    Both are the same sums in another order on the same tokens, so that a variant of any size of
    rounding is near 1, and a fault of its own way through the server stands out.
    """
    if reference is None:
        reason = "the reference's documents were not scored through its server"
        return Missing(metric=RELATIVE, reason=reason, source=source)
    offline = pq.read_table(distribution, columns=["reference_nll_nats"])
    return _ratio(
        RELATIVE,
        (served.log_probs, _offline_log_probs(distribution)),
        (_same_tokens(served, reference).log_probs, -offline["reference_nll_nats"].to_numpy()),
        served.documents,
        source=source,
    )


def _in_units_of_itself(
    distribution: Path, served: ScoredTokens, again: Path | None, *, source: str
) -> Measurement:
    """How far served is from offline, in units of how far it is from served in other batches.

    Offline is a batch of one, so that where batch mates change the rounding this is near 1 too.
    """
    if again is None:
        reason = "the variant's documents were not scored through its server a second time"
        return Missing(metric=OWN_NOISE, reason=reason, source=source)
    return _ratio(
        OWN_NOISE,
        (served.log_probs, _offline_log_probs(distribution)),
        (served.log_probs, _same_tokens(served, again).log_probs),
        served.documents,
        source=source,
    )


def _offline_log_probs(distribution: Path) -> FloatArray:
    table = pq.read_table(distribution, columns=["candidate_nll_nats"])
    nll: FloatArray = table["candidate_nll_nats"].to_numpy()
    return -nll


def _same_tokens(served: ScoredTokens, path: Path) -> ScoredTokens:
    other = read_scored_tokens(path)
    if not np.array_equal(other.token_ids, served.token_ids):
        raise MeasurementError("the other server did not score the same tokens")
    return other


def _ratio(
    metric: str,
    candidate: tuple[FloatArray, FloatArray],
    baseline: tuple[FloatArray, FloatArray],
    documents: npt.NDArray[Any],
    *,
    source: str,
) -> Measurement:
    """Of the sums of differences, by document; each difference is what FP32 can tell at least."""
    _, index = np.unique(documents, return_inverse=True)
    sums = []
    for first, second in (candidate, baseline):
        differences = np.maximum(np.abs(first - second), RESOLUTION_NATS)
        if not np.isfinite(differences).all():
            reason = "the other server has non-finite logits"
            return Missing(metric=metric, reason=reason, source=source)
        sums.append(tuple(np.bincount(index, weights=differences)))
    return ClusteredRatio(metric=metric, candidate=sums[0], baseline=sums[1], source=source)


def reduce_difference(table: pa.Table, prefix: str, *, source: str) -> list[Measurement]:
    """Mean and largest KL and difference of log-probabilities of two paths' finite rows."""
    differences = {
        "kl_nats": table["kl_nats"].to_numpy(),
        "logprob_difference_nats": np.abs(
            table["candidate_nll_nats"].to_numpy() - table["reference_nll_nats"].to_numpy()
        ),
    }
    rest = float(table["rest"].to_numpy().mean())
    documents, positions = table["document"].to_pylist(), table["position"].to_pylist()
    _, index = np.unique(documents, return_inverse=True)
    counts = tuple(int(count) for count in np.bincount(index))
    measured: list[Measurement] = []
    for noun, values in differences.items():
        at = int(values.argmax())
        measured += [
            Clustered(
                metric=f"quality/{prefix}_{noun}.mean",
                unit="nats",
                totals=tuple(np.bincount(index, weights=values)),
                counts=counts,
                source=source,
            ),
            Scalar(
                metric=f"quality/{prefix}_{noun}.max",
                value=float(values[at]),
                unit="nats",
                n=len(values),
                note=f"the largest in {documents[at]} at position {positions[at]}; "
                f"{rest:.1%} of the probability is one lump",
                source=source,
            ),
        ]
    return measured


def missing_served(reason: str, *, source: str | None = None) -> list[Measurement]:
    return [Missing(metric=metric, reason=reason, source=source) for metric in METRICS]


def offline_tokens(distribution: Path) -> ScoredTokens:
    """The candidate's side of the teacher's rows."""
    columns = {"candidate_top_ids": "top_ids", "candidate_top_log_probs": "top_log_probs"}
    names = ["document", "tags", "position", "token_id", "candidate_nll_nats", *columns]
    table = pq.read_table(distribution, columns=names)
    table = table.rename_columns([columns.get(name, name) for name in table.column_names])
    log_probs = -table["candidate_nll_nats"].to_numpy()
    return ScoredTokens.of(table.append_column("log_prob", [log_probs]))


async def _score_all(
    url: str,
    prompts: Sequence[list[int]],
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching,
) -> list[dict[str, list[Any]]]:
    """The columns of each document's positions."""
    body = {
        "max_tokens": 0,
        "temperature": 0.0,
        "echo": True,
        "logprobs": NUM_TOP,
        "return_tokens_as_token_ids": True,
    }
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = CompletionClient(session, url, batching)

        async def score(group: list[int]) -> list[tuple[int, dict[str, list[Any]]]]:
            choices = await complete_each(client, body, [prompts[index] for index in group])
            on_answers(len(group))
            return [
                (index, _read(choice, len(prompts[index])))
                for index, choice in zip(group, choices, strict=True)
            ]

        groups = batching.groups([len(ids) for ids in prompts])
        pairs = [pair for part in await asyncio.gather(*map(score, groups)) for pair in part]
    return [columns for _, columns in sorted(pairs, key=lambda pair: pair[0])]


def _read(choice: dict[str, Any] | str, num_tokens: int) -> dict[str, list[Any]]:
    """The first token has no log-probability: nothing precedes it."""
    if isinstance(choice, str):
        raise MeasurementError(f"the server did not score a document: {choice}")
    try:
        found = choice["logprobs"]
        log_probs = [float(value) for value in found["token_logprobs"][1:]]
        # The token that follows is named last where it is not among the most likely.
        top = [list(named.items())[:NUM_TOP] for named in found["top_logprobs"][1:]]
        ids = [[int(name.removeprefix("token_id:")) for name, _ in row] for row in top]
        values = [[float(value) for _, value in row] for row in top]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MeasurementError(f"{UNEXPECTED}: {error!r}") from error
    if len(log_probs) != num_tokens - 1 or len(ids) != num_tokens - 1:
        raise MeasurementError(f"{UNEXPECTED}: not one log-probability per token")
    return {"log_prob": log_probs, "top_ids": ids, "top_log_probs": values}


@cache
def _scoring_sha256() -> str:
    here = Path(__file__)
    return sha256_of_json(
        [sha256_of_file(here), sha256_of_file(here.with_name("scored_tokens.py"))]
    )
