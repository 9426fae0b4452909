"""Golden sets through the server, against lm-evaluation-harness with its `hf` backend: time, items.

lm_eval lives in an environment of its own; this file is also what its Python runs there (`worker`),
so nothing of quantgate may be imported at the top.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_SPEEDUP = 4.0
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SetComparison:
    """One golden set, scored by both."""

    golden_set: str
    items: int
    our_seconds: float
    their_seconds: float
    our_accuracy: float
    their_accuracy: float
    differing_items: tuple[str, ...]
    """Ids of the items whose score differs."""
    differing_outputs: int
    """Items whose output (or chosen answer) differs."""
    largest_logprob_difference_nats: float | None
    """Of the choices' log-probabilities; None for generation."""

    @property
    def speedup(self) -> float:
        return self.their_seconds / self.our_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run of both: all sets, and each with its start (imports, loading, warm-up)."""

    lm_eval: str
    sets: tuple[SetComparison, ...]
    our_start_seconds: float
    their_start_seconds: float

    @property
    def speedup(self) -> float:
        """Of scoring, without either one's start."""
        return sum(s.their_seconds for s in self.sets) / sum(s.our_seconds for s in self.sets)

    @property
    def whole_speedup(self) -> float:
        """With both starts: how long one waits for a score."""
        theirs = self.their_start_seconds + sum(s.their_seconds for s in self.sets)
        return theirs / (self.our_start_seconds + sum(s.our_seconds for s in self.sets))


def compare(
    python: Path, model: Path, sets: list[Path], folder: Path, *, num_items: int | None
) -> Comparison:
    """Scores the sets with both, one after the other, on all cores each."""
    ours = _score_through_server(model, sets, folder, num_items=num_items)
    request = folder / "request.json"
    request.write_text(json.dumps({"model": str(model), "tasks": ours.tasks}), encoding="utf-8")
    result = folder / "result.json"
    subprocess.run(
        [str(python), __file__, str(request), str(result)],
        check=True,
        env=_environment() | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
    )
    theirs = json.loads(result.read_text(encoding="utf-8"))
    return Comparison(
        lm_eval=theirs["version"],
        sets=tuple(
            _compare_set(name, mine, theirs["tasks"][name]) for name, mine in ours.sets.items()
        ),
        our_start_seconds=ours.start_seconds,
        their_start_seconds=theirs["start_seconds"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ours:
    start_seconds: float
    sets: dict[str, dict[str, Any]]
    tasks: list[dict[str, Any]]


def _score_through_server(
    model: Path, sets: list[Path], folder: Path, *, num_items: int | None
) -> _Ours:
    from quantgate.quality.answers import ask_golden_set
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.rendering import Renderer
    from quantgate.quality.scoring import score_items
    from quantgate.server import ServerOptions, running_server

    renderer = Renderer(model)
    found: dict[str, dict[str, Any]] = {}
    tasks = []
    started = time.perf_counter()
    options = ServerOptions(max_batch_size=BATCH_SIZE, max_batched_tokens=512, kv_tokens=32_768)
    with running_server(model, log=folder / "server.log", options=options) as server:
        start_seconds = time.perf_counter() - started
        # `evaluate` is imported by the first score; lm_eval's imports are not in its time either.
        score_items("exact_match", ["a"], ["a"])
        for path in sets:
            golden = load_golden_set(path)
            started = time.perf_counter()
            prompts = renderer.render(golden)[:num_items]
            answers = ask_golden_set(server.url, golden, prompts, timeout_s=600)
            outputs = [answer.output for answer in answers]
            scores = score_items("exact_match", outputs, [p.item.target for p in prompts])
            found[golden.name] = {
                "seconds": time.perf_counter() - started,
                "ids": [prompt.item.id for prompt in prompts],
                "outputs": outputs,
                "scores": scores,
                "log_probs": [list(answer.choice_log_probs) for answer in answers],
            }
            tasks.append(_task_of(golden, prompts, renderer, folder))
    return _Ours(start_seconds=start_seconds, sets=found, tasks=tasks)


def _task_of(golden: Any, prompts: list[Any], renderer: Any, folder: Path) -> dict[str, Any]:
    """The same items as a task of lm_eval: rendered text, and what to do with it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(renderer.folder)
    data = folder / f"{golden.name}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            item = prompt.item
            text = item.text or ""
            if item.messages is not None:
                text = tokenizer.apply_chat_template(
                    [dict(m) for m in item.messages], add_generation_prompt=True, tokenize=False
                )
            if tokenizer(text, add_special_tokens=item.messages is None)["input_ids"] != list(
                prompt.ids
            ):
                raise RuntimeError(f"{item.id}: the text does not give the tokens of the prompt")
            row = {"text": text, "target": item.target, "choices": list(item.choices)}
            file.write(json.dumps(row) + "\n")
    common = {
        "task": golden.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    if golden.task.output_type == "multiple_choice":
        return common | {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{choices.index(target)}}",
            "metric_list": [{"metric": "acc"}],
        }
    return common | {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {
            "until": list(golden.task.generation_kwargs.until),
            "max_gen_toks": golden.task.generation_kwargs.max_gen_toks,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match"}],
    }


def _compare_set(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> SetComparison:
    pairs = list(zip(ours["log_probs"], theirs["log_probs"], strict=True))
    differences = [
        abs(a - b) for mine, other in pairs if mine for a, b in zip(mine, other, strict=True)
    ]
    return SetComparison(
        golden_set=name,
        items=len(ours["ids"]),
        our_seconds=ours["seconds"],
        their_seconds=theirs["seconds"],
        our_accuracy=sum(ours["scores"]) / len(ours["scores"]),
        their_accuracy=sum(theirs["scores"]) / len(theirs["scores"]),
        differing_items=tuple(
            id
            for id, a, b in zip(ours["ids"], ours["scores"], theirs["scores"], strict=True)
            if a != b
        ),
        differing_outputs=sum(
            a != b for a, b in zip(ours["outputs"], theirs["outputs"], strict=True)
        ),
        largest_logprob_difference_nats=max(differences, default=None),
    )


def _environment() -> dict[str, str]:
    """Without our packages: lm_eval's environment has its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def worker(request: Path, result: Path) -> None:
    """Runs lm_eval's own evaluation of each task with its `hf` model, batched."""
    started = time.perf_counter()
    from importlib.metadata import version

    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    asked = json.loads(request.read_text(encoding="utf-8"))
    model = HFLM(pretrained=asked["model"], device="cpu", dtype="float32", batch_size=BATCH_SIZE)
    tasks = {config["task"]: ConfigurableTask(config=config) for config in asked["tasks"]}
    start_seconds = time.perf_counter() - started
    found = {}
    for name, task in tasks.items():
        started = time.perf_counter()
        output = lm_eval.evaluate(
            lm=model, task_dict={name: task}, log_samples=True, bootstrap_iters=0
        )
        seconds = time.perf_counter() - started
        samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = {"seconds": seconds} | _read_samples(samples)
    result.write_text(
        json.dumps({"version": version("lm_eval"), "start_seconds": start_seconds, "tasks": found}),
        encoding="utf-8",
    )


def _read_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    outputs, scores, log_probs = [], [], []
    for sample in samples:
        if "acc" in sample:
            values = [answer[0] for answer in sample["filtered_resps"]]
            outputs.append(sample["doc"]["choices"][values.index(max(values))])
            scores.append(float(sample["acc"]))
            log_probs.append(values)
        else:
            outputs.append(sample["filtered_resps"][0])
            scores.append(float(sample["exact_match"]))
            log_probs.append([])
    return {"outputs": outputs, "scores": scores, "log_probs": log_probs}


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
