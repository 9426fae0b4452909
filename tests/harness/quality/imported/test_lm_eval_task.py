"""Tasks of lm-evaluation-harness: what is carried over unchanged, and what is refused by name.

Where lm_eval is installed, the real one builds the tasks: LM_EVAL=/path/to/lm_eval, or on PATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantgate.errors import GoldenSetError, UsageError
from quantgate.quality.answers import ask_golden_set
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.imported.folder import ImportedSet, write_imported
from quantgate.quality.imported.lm_eval_task import TaskRequest, import_task, read_task
from quantgate.quality.rendering import Renderer
from quantgate.quality.scoring import score_items
from quantgate.server import ServerOptions, running_server
from quantgate.variants.source import demo_folder

SETS = Path(__file__).parents[4] / "golden_sets"
LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
needs_lm_eval = pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed; see LM_EVAL")

REQUEST = TaskRequest(task="desk")
CHOICE: dict[str, Any] = {
    "lm_eval": "0.4.13", "task": "desk", "version": 1.0, "output_type": "multiple_choice",
    "num_fewshot": 0, "target_delimiter": " ", "dataset": ["json", None], "split": "test",
    "metric_list": [{"metric": "acc"}], "filter_list": None, "generation_kwargs": None,
    "process_results": None, "doc_to_image": None, "doc_to_audio": None,
    "should_decontaminate": False, "repeats": 1, "has_several_contexts": False,
    "documents": [
        {
            "number": 0,
            "requests": [["Q: x\nA:", " no"], ["Q: x\nA:", " yes"]],
            "target": 1,
            "choices": ["no", "yes"],
            "fields": {"kind": "long", "page": 7, "note": ""},
        }
    ],
}  # fmt: skip
GENERATE: dict[str, Any] = CHOICE | {
    "output_type": "generate_until",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
    "documents": [
        {"number": 0, "requests": [["2+2="]], "target": 4, "choices": [], "fields": {}},
    ],
}
STRICT = {"name": "strict", "filter": [{"function": "regex"}, {"function": "take_first"}]}


def first(built: dict[str, Any], **request: Any) -> dict[str, Any]:
    asked = TaskRequest(task="desk", **request)
    return import_task(built, asked, name="desk").rows[0][1]


def test_a_choice_keeps_the_delimiter_and_a_position_becomes_its_text() -> None:
    assert first(CHOICE) == {
        "id": "desk-00000",
        "input": "Q: x\nA:",
        "target": " yes",
        "choices": [" no", " yes"],
    }


def test_white_space_at_the_end_of_a_context_is_scored_with_the_choice_as_lm_eval_does() -> None:
    document = CHOICE["documents"][0] | {"requests": [["A: ", "no"], ["A: ", "yes"]]}
    item = first(CHOICE | {"documents": [document]})
    assert (item["input"], item["choices"]) == ("A:", [" no", " yes"])


def test_a_generated_answer_keeps_its_limit_its_stops_and_the_text_of_its_target() -> None:
    found = import_task(GENERATE, REQUEST, name="desk")
    assert found.rows[0][1] == {"id": "desk-00000", "input": "2+2=", "target": "4"}
    assert found.task["generation_kwargs"] == {"max_gen_toks": 5, "until": ["\n"]}
    assert found.task["metric_list"] == [{"metric": "exact_text"}]


@pytest.mark.parametrize(
    ("kwargs", "tokens", "until"),
    [
        ({"until": "\n\n"}, 256, ["\n\n"]),
        ({"max_new_tokens": 9}, 9, []),
        ({"max_tokens": 8, "max_gen_toks": 7}, 7, []),
        ({"do_sample": False, "temperature": 0.7}, 256, []),
    ],
)
def test_generation_is_bounded_as_lm_eval_bounds_it(
    kwargs: dict[str, Any], tokens: int, until: list[str]
) -> None:
    found = import_task(GENERATE | {"generation_kwargs": kwargs}, REQUEST, name="desk")
    assert found.task["generation_kwargs"] == {"max_gen_toks": tokens, "until": until}


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (CHOICE | {"output_type": "loglikelihood"}, "output_type loglikelihood"),
        (CHOICE | {"process_results": "<score>"}, "process_results <score>"),
        (CHOICE | {"doc_to_image": "image"}, "doc_to_image"),
        (CHOICE | {"has_several_contexts": True}, "doc_to_text is an index"),
        (CHOICE | {"repeats": 4}, "repeats 4"),
        (CHOICE | {"metric_list": [{"metric": "<f1>"}]}, "metric <f1>: quantgate computes acc"),
        (
            CHOICE | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
            "metric acc_norm: quantgate computes acc; leave it out with --metrics acc",
        ),
        (CHOICE | {"metric_list": [{"metric": "exact_match"}]}, "metric exact_match"),
        (
            GENERATE | {"metric_list": [{"metric": "exact_match", "ignore_case": True}]},
            "metric exact_match with ignore_case: True",
        ),
        (
            GENERATE | {"metric_list": [{"metric": "exact_match", "aggregation": "<worst>"}]},
            "aggregation <worst>; expected the mean",
        ),
        (
            GENERATE | {"filter_list": [STRICT]},
            "filter strict (regex, take_first)",
        ),
        (GENERATE | {"generation_kwargs": {"do_sample": True}}, "do_sample"),
        (GENERATE | {"generation_kwargs": {"temperature": 0.7}}, "do_sample"),
        (GENERATE | {"generation_kwargs": {"top_p": 0.9}}, "generation_kwargs top_p"),
        (GENERATE | {"generation_kwargs": {"until": ["x"] * 17}}, "16 strings at most"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(
    built: dict[str, Any], message: str
) -> None:
    with pytest.raises(GoldenSetError, match="desk: cannot be carried over") as caught:
        import_task(built, REQUEST, name="desk")
    assert message in str(caught.value)


def test_every_reason_is_named_at_once() -> None:
    built = CHOICE | {"repeats": 2, "process_results": "<score>"}
    with pytest.raises(GoldenSetError, match=r"(?s)process_results.*repeats 2"):
        import_task(built, REQUEST, name="desk")


def test_a_metric_may_be_left_out_only_by_saying_which_ones_stay() -> None:
    built = CHOICE | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    found = import_task(built, TaskRequest(task="desk", metrics=("acc",)), name="desk")
    assert found.metadata["lm_eval"]["metrics"] == {"acc": "exact_match"}
    with pytest.raises(GoldenSetError, match="--metrics f1: the task has acc, acc_norm"):
        import_task(built, TaskRequest(task="desk", metrics=("f1",)), name="desk")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 2}, "target 2 is none of the choices ['no', 'yes']"),
        ({"target": -1}, "target -1 is none"),
        ({"target": "maybe"}, "target 'maybe' is none"),
        ({"target": [0, 1]}, "2 known answers; expected one"),
        ({"requests": [["a", " no"], ["b", " yes"]]}, "2 contexts; expected one"),
    ],
)
def test_a_document_without_one_known_answer_is_named_by_its_number(
    changes: dict[str, Any], message: str
) -> None:
    built = CHOICE | {"documents": [CHOICE["documents"][0] | {"number": 7} | changes]}
    with pytest.raises(GoldenSetError) as caught:
        import_task(built, REQUEST, name="desk")
    assert str(caught.value).startswith(f"desk, document 7: {message}")


def test_fields_of_a_document_become_its_id_tags_and_cluster() -> None:
    item = first(CHOICE, id="page", tags=("kind",), cluster="page")
    assert (item["id"], item["tags"], item["cluster"]) == ("7", ["kind:long"], "7")
    for name in ("nowhere", "note"):
        with pytest.raises(GoldenSetError, match=f"document 0: no text or number '{name}'"):
            first(CHOICE, tags=(name,))


def test_without_lm_eval_the_error_says_what_to_write(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    with pytest.raises(UsageError, match=r"has no lm_eval\. Write: python -m pip install lm_eval"):
        read_task(TaskRequest(task="desk", python=empty / "bin" / "python"))


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--python .*nothing: No such file"):
        read_task(TaskRequest(task="desk", python=tmp_path / "nothing"))


# The real lm_eval, on tasks with data of their own.


def python_of_lm_eval() -> Path:
    """The interpreter in the first line of the program."""
    text = Path(str(LM_EVAL)).read_text(encoding="utf-8")
    found = re.search(r"(/\S+/python[\d.]*)", text)
    assert found is not None, LM_EVAL
    return Path(found[1])


def documents(name: str, start: int, count: int) -> list[dict[str, Any]]:
    """Items of a shipped golden set as the order desk's model reads them, as plain text."""
    items = load_golden_set(SETS / name).items[start : start + count]
    return [
        {
            "text": f"<|bos|><|user|>{(item.messages or ())[0]['content']}<|end|><|assistant|>",
            "answer": item.target,
            "choices": list(item.choices),
            "template": item.tags[0],
        }
        for item in items
    ]


def write_task(folder: Path, name: str = "order-route", **changes: Any) -> Path:
    files = {}
    for split, start, count in (("test", 0, 40), ("train", 40, 10)):
        files[split] = str(folder / f"{split}.jsonl")
        rows = documents(name, start, count)
        Path(files[split]).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    task = {
        "task": "desk",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "target_delimiter": "",
        "doc_to_text": "text",
        "doc_to_target": "answer",
    }
    path = folder / "desk.yaml"
    path.write_text(yaml.safe_dump(task | changes), encoding="utf-8")
    return path


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "num_fewshot": 1,
    "fewshot_delimiter": "<|end|>",
    "metric_list": [{"metric": "acc"}],
}
GENERATED = {
    "output_type": "generate_until",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["=6", "\n"], "max_gen_toks": 20},
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def built_by_lm_eval(task: Path | str, **request: Any) -> ImportedSet:
    asked = TaskRequest(task=str(task), python=python_of_lm_eval(), **request)
    return import_task(read_task(asked), asked, name="desk")


def evaluated_by_lm_eval(task: Path, folder: Path) -> list[dict[str, Any]]:
    """Its own samples, by document, of the demo model in its `hf` backend."""
    subprocess.run(
        [
            *(str(LM_EVAL), "--model", "hf", "--tasks", str(task), "--batch_size", "8"),
            *("--model_args", f"pretrained={demo_folder()},dtype=float32", "--device", "cpu"),
            *("--output_path", str(folder / "out"), "--log_samples"),
        ],
        check=True,
        capture_output=True,
    )
    (log,) = (folder / "out").rglob("samples_desk_*.jsonl")
    samples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def asked_through_the_server(golden: GoldenSet, folder: Path) -> list[tuple[str, float]]:
    """(output, score) of each item, as a release asks and scores it."""
    prompts = Renderer(demo_folder()).render(golden)
    options = ServerOptions(threads=1, max_batch_size=8, dtype="float32")
    with running_server(demo_folder(), log=folder / "server.log", options=options) as server:
        answers = ask_golden_set(server.url, golden, prompts, timeout_s=120)
    assert [answer.error for answer in answers] == [None] * len(prompts)
    outputs = [answer.output for answer in answers]
    (spec,) = golden.task.metric_list
    targets = [item.target for item in golden.items]
    return list(zip(outputs, score_items(spec.metric, outputs, targets), strict=True))


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "changes"), [("order-route", CHOICES), ("order-total", GENERATED)]
)
def test_items_are_what_lm_eval_itself_asks_and_score_as_it_scores(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    task = write_task(tmp_path, name, **changes)
    write_imported(built_by_lm_eval(task), tmp_path / "sets" / "desk")
    golden = load_golden_set(tmp_path / "sets" / "desk")
    samples = evaluated_by_lm_eval(task, tmp_path)
    scored = asked_through_the_server(golden, tmp_path)
    assert len(samples) == len(golden.items) == len(scored) == 40
    for sample, item, (output, score) in zip(samples, golden.items, scored, strict=True):
        asked = [sample["arguments"][f"gen_args_{i}"] for i in range(len(sample["arguments"]))]
        if item.choices:
            assert [(one["arg_0"], one["arg_1"]) for one in asked] == [
                (item.text, choice) for choice in item.choices
            ]
            assert score == sample["acc"]
        else:
            assert [one["arg_0"] for one in asked] == [item.text]
            assert output == sample["filtered_resps"][0]
            assert score == sample["exact_match"]
    # Both answers occur, or the comparison would show little.
    assert {score for _, score in scored} == {0.0, 1.0}


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_examples_follow_lm_evals_seed_and_number(tmp_path: Path) -> None:
    task = write_task(tmp_path, **CHOICES)

    def prompts(**asked: Any) -> list[str]:
        return [row["input"] for _, row in built_by_lm_eval(task, **asked).rows]

    assert prompts() == prompts(fewshot_seed=1234) != prompts(fewshot_seed=5)
    assert {prompt.count("<|user|>") for prompt in prompts(num_fewshot=3)} == {4}


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_what_lm_eval_cannot_build_is_said_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)could not build the task.*nowhere"):
        built_by_lm_eval(write_task(tmp_path, test_split="nowhere", **GENERATED))
    with pytest.raises(UsageError, match="lm_eval has no task 'no_such_task'"):
        built_by_lm_eval("no_such_task")
