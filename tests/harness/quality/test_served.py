"""Served = offline: what the real server says of documents, and what it says when it is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from quantgate.errors import MeasurementError
from quantgate.files import sha256_of_file
from quantgate.measure import Clustered, ClusteredRatio, Measurement, Missing, Scalar
from quantgate.policy import load_policy
from quantgate.quality.completions import FULL_BATCHES
from quantgate.quality.distribution import Candidate, Comparison, compare_with_reference
from quantgate.quality.golden import load_golden_set
from quantgate.quality.noise_floor import (
    OTHER_BATCHES,
    Rerun,
    floors_of_distribution,
    reduce_noise,
)
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.served import (
    METRICS,
    OWN_NOISE,
    RELATIVE,
    RESOLUTION_NATS,
    _read,
    is_asked_twice,
    measure_served,
    reduce_served,
)
from quantgate.quality.stage import ServedModel
from quantgate.server import ServerOptions
from quantgate.server_pool import ServerPool
from quantgate.variants.source import demo_folder

ROOT = Path(__file__).resolve().parents[3]
MAX_TOKENS = 96
HEAD_DIM = 64
OPTIONS = ServerOptions(threads=1, max_batch_size=8, max_batched_tokens=160, kv_tokens=4096)
FP32_MEAN_NATS, FP32_WORST_NATS = 1e-5, 1e-3
"""What sums in another order may do; the demo policy's limits."""


@pytest.fixture(scope="module")
def documents() -> list[RenderedPrompt]:
    prose = load_golden_set(ROOT / "golden_sets" / "order-prose")
    return Renderer(demo_folder()).render(prose)[:32]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    folder = demo_folder()
    digest = sha256_of_file(folder / "model.safetensors")
    return ServedModel(name="source", folder=folder, artifact_sha256=digest)


@pytest.fixture(scope="module")
def offline(
    model: ServedModel,
    documents: list[RenderedPrompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    failures = compare_with_reference(
        Comparison(
            reference=model.folder,
            documents=documents,
            device="cpu",
            dtype="float32",
            threads=1,
            max_tokens=MAX_TOKENS,
            max_context=None,
        ),
        {"source": Candidate(folder=model.folder, scheme="bf16", group_size=128)},
        out={"source": folder / "distribution.parquet"},
        log=folder / "log",
        on_done=lambda _: None,
    )
    assert failures == {}
    return folder / "distribution.parquet"


@dataclass(frozen=True)
class Sound:
    """What a sound server said, twice."""

    rerun: Rerun
    store: Path


@pytest.fixture(scope="module")
def sound(
    model: ServedModel,
    documents: list[RenderedPrompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> Sound:
    store = tmp_path_factory.mktemp("sound")
    with ServerPool(OPTIONS, keeps_running=True) as servers:
        first, second = (
            measure_served(
                model, documents, max_tokens=MAX_TOKENS, store=store, log=store / "log",
                servers=servers, timeout_s=120, on_answers=lambda _: None, batching=batching,
            )
            for batching in (FULL_BATCHES, OTHER_BATCHES)
        )  # fmt: skip
    return Sound(Rerun(first=first, second=second), store)


def mean(found: dict[str, Measurement], metric: str) -> float:
    measured = found[metric]
    assert isinstance(measured, Clustered)
    return sum(measured.totals) / sum(measured.counts)


def worst(found: dict[str, Measurement], metric: str) -> float:
    measured = found[metric]
    assert isinstance(measured, Scalar)
    return measured.value


def ratio(found: dict[str, Measurement]) -> float:
    measured = found[RELATIVE]
    assert isinstance(measured, ClusteredRatio)
    return sum(measured.candidate) / sum(measured.baseline)


def reduced(
    offline: Path, served: Path, reference: Path | None = None, *, again: Path | None = None
) -> dict[str, Measurement]:
    found = reduce_served(
        offline, served, reference=reference, again=again, source="served.parquet"
    )
    return {m.metric: m for m in found}


def test_a_sound_server_says_what_offline_scoring_says(offline: Path, sound: Sound) -> None:
    found = reduced(offline, sound.rerun.first)
    assert found.keys() == set(METRICS)
    assert mean(found, "quality/served_kl_nats.mean") < FP32_MEAN_NATS
    assert worst(found, "quality/served_logprob_difference_nats.max") < FP32_WORST_NATS


def test_a_server_that_reads_the_values_of_another_head_in_one_layer_is_far_beyond_rounding(
    offline: Path,
    sound: Sound,
    model: ServedModel,
    documents: list[RenderedPrompt],
    tmp_path: Path,
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model.folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    values = "model.layers.1.self_attn.v_proj.weight"
    tensors[values] = tensors[values].roll(HEAD_DIM, dims=0).contiguous()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with ServerPool(OPTIONS, keeps_running=False) as servers:
        served = measure_served(
            replace(model, folder=damaged), documents, max_tokens=MAX_TOKENS, store=tmp_path,
            log=tmp_path / "log", servers=servers, timeout_s=120, on_answers=lambda _: None,
        )  # fmt: skip
    found = reduced(offline, served, sound.rerun.first)
    assert ratio(found) > 100
    assert mean(found, "quality/served_kl_nats.mean") > FP32_MEAN_NATS
    assert worst(found, "quality/served_logprob_difference_nats.max") > FP32_WORST_NATS


def test_a_sound_server_is_as_far_from_offline_as_the_references(
    offline: Path, sound: Sound
) -> None:
    # The same model in both places, in other batches: what is served is the reference's noise.
    found = reduced(offline, sound.rerun.second, sound.rerun.first)
    assert ratio(found) == pytest.approx(1, abs=0.2)


def test_without_a_served_reference_nothing_is_in_its_units(offline: Path, sound: Sound) -> None:
    found = reduced(offline, sound.rerun.first)[RELATIVE]
    assert isinstance(found, Missing)
    assert "the reference's documents were not scored through its server" in found.reason


def test_a_server_is_in_units_of_itself_where_it_was_asked_twice(
    offline: Path, sound: Sound
) -> None:
    first, second = sound.rerun.first, sound.rerun.second
    measured = reduced(offline, first, again=second)[OWN_NOISE]
    assert isinstance(measured, ClusteredRatio)
    # In FP32 served is the same in any batches, so that its noise is what FP32 can tell.
    said = [pq.read_table(path)["log_prob"].to_numpy() for path in (first, second)]
    differences = np.maximum(np.abs(said[0] - said[1]), RESOLUTION_NATS)
    assert sum(measured.baseline) == pytest.approx(differences.sum())
    once = reduced(offline, first)[OWN_NOISE]
    assert isinstance(once, Missing)
    assert "a second time" in once.reason


def test_only_a_variant_with_a_gate_on_it_is_asked_twice() -> None:
    policy = load_policy(ROOT / "gates" / "policies" / "demo.cpu.yaml")
    names = [name for name in ("source", *policy.variants) if is_asked_twice(policy, name)]
    assert names == ["int8-bnb"]


def test_differences_below_what_fp32_can_tell_count_as_that(
    offline: Path, sound: Sound, tmp_path: Path
) -> None:
    exact = pq.read_table(sound.rerun.first)
    nll = pq.read_table(offline)["reference_nll_nats"].to_numpy()
    at = exact.column_names.index("log_prob")
    pq.write_table(exact.set_column(at, "log_prob", [-nll]), tmp_path / "exact.parquet")
    measured = reduced(offline, sound.rerun.first, tmp_path / "exact.parquet")[RELATIVE]
    assert isinstance(measured, ClusteredRatio)
    assert sum(measured.baseline) == pytest.approx(RESOLUTION_NATS * len(nll))


def test_the_reference_against_itself_is_the_noise_floor(sound: Sound) -> None:
    found = {m.metric: m for m in reduce_noise(sound.rerun, source="again")}
    assert mean(found, "quality/noise_floor_kl_nats.mean") < FP32_MEAN_NATS
    floors = {f.metric: f for f in floors_of_distribution(sound.rerun, source="again")}
    for metric in ("quality/kl_nats.mean", "quality/served_kl_nats.mean"):
        floor = floors[metric]
        assert isinstance(floor, Scalar)
        assert floor.value == pytest.approx(mean(found, "quality/noise_floor_kl_nats.mean"))
    perplexity = floors["quality/perplexity.ratio"]
    assert isinstance(perplexity, Scalar)
    assert 0 <= perplexity.value < FP32_MEAN_NATS


def test_what_the_store_has_is_not_asked_again(
    sound: Sound, model: ServedModel, documents: list[RenderedPrompt]
) -> None:
    told: list[int] = []
    with ServerPool(OPTIONS, keeps_running=True) as servers:
        path = measure_served(
            model, documents, max_tokens=MAX_TOKENS, store=sound.store, log=sound.store / "none",
            servers=servers, timeout_s=1, on_answers=told.append,
        )  # fmt: skip
    assert path == sound.rerun.first
    assert told == [len(documents)]
    assert not (sound.store / "none").exists()


def test_positions_that_are_not_finite_leave_a_reason_and_no_number(
    offline: Path, sound: Sound, tmp_path: Path
) -> None:
    table = pq.read_table(sound.rerun.first)
    values = table["log_prob"].to_numpy().copy()
    values[5] = float("nan")
    spoiled = table.set_column(table.column_names.index("log_prob"), "log_prob", [values])
    pq.write_table(spoiled, tmp_path / "spoiled.parquet")
    found = reduced(offline, tmp_path / "spoiled.parquet")
    assert found.keys() == set(METRICS)
    for measured in found.values():
        assert isinstance(measured, Missing)
        assert "1 of 3040 positions have non-finite logits" in measured.reason


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("HTTP 500: no", "did not score a document: HTTP 500"),
        ({"logprobs": None}, "not of the expected form"),
        ({"logprobs": {"token_logprobs": [None, -1.0], "top_logprobs": [None]}}, "one log-prob"),
        ({"logprobs": {"token_logprobs": [None], "top_logprobs": [None]}}, "one log-prob"),
        (
            {"logprobs": {"token_logprobs": [None, -1.0], "top_logprobs": [None, {"a": -1.0}]}},
            "not of the expected form",
        ),
    ],
)
def test_an_answer_of_another_form_is_an_error(choice: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        _read(choice, 2)


class FakePool(ServerPool):
    """Hands out a server that somebody else runs."""

    def __init__(self, url: str) -> None:
        super().__init__(OPTIONS, keeps_running=True)
        self._url = url

    @contextmanager
    def serving(self, folder: Path, *, log: Path) -> Iterator[Any]:
        yield SimpleNamespace(url=self._url)


def test_a_refused_document_is_no_measurement(
    serve: Callable[..., Any], model: ServedModel, documents: list[RenderedPrompt], tmp_path: Path
) -> None:
    async def refuse(body: dict[str, Any]) -> tuple[int, Any]:
        return 400, {"error": {"message": "too long"}}

    with (
        serve(refuse) as url,
        pytest.raises(MeasurementError, match="did not score a document: HTTP 400: too long"),
    ):
        measure_served(
            model, documents, max_tokens=MAX_TOKENS, store=tmp_path, log=tmp_path / "log",
            servers=FakePool(url), timeout_s=5, on_answers=lambda _: None,
        )  # fmt: skip
    assert not list(tmp_path.glob("served-*"))
