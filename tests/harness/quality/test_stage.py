"""Stored results are found by what they depend on: a change misses them, another name does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantgate.errors import ServerDied
from quantgate.quality import stage
from quantgate.quality.completions import FULL_BATCHES, Batching
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.lock import write_lock
from quantgate.quality.rendering import Renderer
from quantgate.quality.results import count_errors
from quantgate.quality.stage import (
    QualityResult,
    ServedModel,
    join_results,
    measure_quality,
    results_key,
)
from quantgate.server import ServerOptions
from quantgate.server_pool import ServerPool
from quantgate.variants.build import adopt_variant

ITEMS = [{"id": f"i{n}", "input": f"q{n}", "target": "4"} for n in range(2)]
OPTIONS = ServerOptions(max_batch_size=8, threads=1)
WriteSet = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(make_tokenizer: Callable[..., Path]) -> Path:
    found = make_tokenizer()
    (found / "config.json").write_text(json.dumps({"dtype": "bfloat16"}), encoding="utf-8")
    (found / "model.safetensors").write_bytes(bytes(64))
    return found


@pytest.fixture
def locked(
    write_set: WriteSet, text_task: dict[str, Any], folder: Path
) -> Callable[..., GoldenSet]:
    """A set of two items, locked as it is; keyword arguments change the task."""

    def make(*lines: dict[str, Any], **task: Any) -> GoldenSet:
        golden = load_golden_set(write_set(*(lines or ITEMS), task=text_task | task))
        renderer = Renderer(folder)
        write_lock(golden, renderer.describe(golden, renderer.render(golden)), model="tiny")
        return golden

    return make


def key(
    golden: GoldenSet,
    *,
    options: ServerOptions = OPTIONS,
    batching: Batching = FULL_BATCHES,
    **changes: Any,
) -> str:
    model = ServedModel(name="v", folder=Path("here"), artifact_sha256="a" * 64)
    servers = ServerPool(options, keeps_running=False)
    return results_key(replace(model, **changes), golden, servers, batching)


def test_another_name_or_place_of_the_same_bytes_finds_the_results(
    locked: Callable[..., GoldenSet],
) -> None:
    golden = locked()
    assert key(golden) == key(golden, name="renamed", folder=Path("elsewhere"))


def test_one_byte_of_the_artifact_misses_them(
    locked: Callable[..., GoldenSet], folder: Path
) -> None:
    def digest() -> str:
        return adopt_variant(folder, name="v", scheme="bf16").manifest.artifact_sha256

    golden, before = locked(), digest()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = digest()
    assert key(golden, artifact_sha256=before) != key(golden, artifact_sha256=after)


@pytest.mark.parametrize(
    "changed",
    [
        {"lines": [ITEMS[0], ITEMS[1] | {"input": "q2"}]},
        {"lines": [ITEMS[0], ITEMS[1] | {"target": "5"}]},
        {"lines": [ITEMS[0], ITEMS[1] | {"tags": ["long"]}]},
        {"lines": ITEMS[:1]},
        {"generation_kwargs": {"max_gen_toks": 9, "until": ["\n"]}},
        {"generation_kwargs": {"max_gen_toks": 8, "until": ["\n", ";"]}},
        {"metric_list": [{"metric": "token_f1"}]},
        {"validity": [{"type": "finished"}]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_set_or_sampling_setting_that_was_locked_anew_misses_them(
    locked: Callable[..., GoldenSet], changed: dict[str, Any]
) -> None:
    before = key(locked())
    assert key(locked(*changed.pop("lines", []), **changed)) != before


@pytest.mark.parametrize(
    "changed",
    [
        {"max_batch_size": 9},
        {"max_batched_tokens": 64},
        {"threads": 2},
        {"dtype": "bfloat16"},
        {"kv_tokens": 64},
        {"device": "cuda:0"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_the_server_batches_and_computes_is_part_of_the_results(
    locked: Callable[..., GoldenSet], changed: dict[str, Any]
) -> None:
    golden = locked()
    assert key(golden, options=replace(OPTIONS, **changed)) != key(golden)


def test_how_many_prompts_travel_together_is_too(locked: Callable[..., GoldenSet]) -> None:
    golden = locked()
    assert key(golden, batching=Batching(prompts_per_request=1)) != key(golden)


def test_how_long_a_server_may_take_to_start_is_not(locked: Callable[..., GoldenSet]) -> None:
    golden = locked()
    assert key(golden, options=replace(OPTIONS, ready_timeout_s=1.0)) == key(golden)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine_sha256", lambda: "another engine"),
        ("processor_of", lambda device: "another processor"),
        ("_ROW_MODULES", ("answers.py",)),
    ],
)
def test_an_engine_a_processor_or_checks_of_another_version_miss_them(
    locked: Callable[..., GoldenSet], monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    golden = locked()
    before = key(golden)
    monkeypatch.setattr(stage, name, value)
    assert key(golden) != before


def test_code_is_every_file_in_whatever_language_but_not_what_python_compiled(
    tmp_path: Path,
) -> None:
    (tmp_path / "native" / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "native/layer.c", "native/__pycache__/a.pyc"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = stage.digest_code(tmp_path)
    assert found.keys() == {"a.py", "native/layer.c"}
    (tmp_path / "native" / "layer.c").write_text("y", encoding="utf-8")
    assert stage.digest_code(tmp_path) != found


def test_the_engine_is_its_code_and_the_packages_it_computes_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage.engine_sha256.cache_clear()
    before = stage.engine_sha256()
    stage.engine_sha256.cache_clear()
    monkeypatch.setattr(stage, "versions_of", lambda packages: {"torch": "99"})
    assert stage.engine_sha256() != before
    stage.engine_sha256.cache_clear()


class Pool:
    """One server, which somebody else started, of which `ooms` are read."""

    options = OPTIONS

    def __init__(self, url: str, count_ooms: Callable[[], int]) -> None:
        self.url, self.count_ooms = url, count_ooms

    @contextmanager
    def serving(self, folder: Path, *, log: Path) -> Iterator[Any]:
        yield SimpleNamespace(url=self.url, oom_count=self.count_ooms, peak_bytes=lambda: 1)


@pytest.fixture
def measure(
    locked: Callable[..., GoldenSet], folder: Path, tmp_path: Path, serve: Any
) -> Callable[..., QualityResult]:
    golden, store = locked(), tmp_path / "store"
    store.mkdir()

    def run(status: int, count_ooms: Callable[[], int] = lambda: 0) -> QualityResult:
        async def complete(body: dict[str, Any]) -> tuple[int, Any]:
            answer = {"text": "4", "finish_reason": "stop", "stop_reason": None, "token_ids": [1]}
            choices = [answer | {"index": index} for index in range(len(body["prompt"]))]
            return status, {"choices": choices}

        with serve(complete) as url:
            return measure_quality(
                ServedModel(name="v", folder=folder, artifact_sha256="a" * 64),
                [golden],
                store=store,
                log=store / "v.log",
                servers=Pool(url, count_ooms),  # type: ignore[arg-type]
                timeout_s=10,
                on_answers=lambda _: None,
            )

    return run


def test_items_without_an_answer_are_asked_again_by_the_next_release(
    measure: Callable[..., QualityResult],
) -> None:
    refused = measure(503)
    assert count_errors(refused.items["small"]) == (2, 2)
    answered = measure(200)
    assert answered.num_reused == 0
    assert count_errors(answered.items["small"]) == (0, 2)
    # Now there is nothing to be asked.
    again = measure(503)
    assert again.num_reused == 1
    assert count_errors(again.items["small"]) == (0, 2)


def test_a_server_that_dies_leaves_no_earlier_answers_in_place_of_its_own(
    measure: Callable[..., QualityResult],
) -> None:
    def dies() -> int:
        raise ServerDied("the server exited")

    measure(503)
    died = measure(200, dies)
    assert (died.items, died.missing) == ({}, {"small": "the server exited"})


def result(name: str, **facts: Any) -> QualityResult:
    known = {"missing": {}, "oom_count": 1, "peak_bytes": 5, "num_reused": 1}
    return QualityResult(**{"items": {name: Path(name)}} | known | facts)


def test_sets_asked_one_by_one_are_one_result() -> None:
    joined = join_results([result("a"), result("b", peak_bytes=7, num_reused=0)])
    assert joined == QualityResult(
        items={"a": Path("a"), "b": Path("b")},
        missing={},
        oom_count=2,
        peak_bytes=7,
        num_reused=1,
    )


def test_a_server_that_died_under_one_set_has_no_known_count() -> None:
    died = result("b", items={}, missing={"b": "it died"}, oom_count=None, peak_bytes=0)
    joined = join_results([result("a"), died])
    assert joined.oom_count is None
    assert joined.items.keys() == {"a"}
    assert joined.missing == {"b": "it died"}


def test_nothing_asked_is_a_result_too() -> None:
    assert join_results([]).items == {}
