"""From a task of lm-evaluation-harness to a golden set that scores as lm_eval does.

lm_eval itself builds every prompt, few-shot examples included, so the strings are its own. What a
golden set cannot hold is refused by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import GoldenSetError, UsageError
from quantgate.quality.imported import lm_eval_process
from quantgate.quality.imported.folder import ImportedSet

INSTALL = "python -m pip install lm_eval"

# Per output type, what quantgate computes under which name. In a multiple_choice task lm_eval's
# exact_match is another thing: whether greedy decoding would have written the answer.
_METRICS = {
    "multiple_choice": {"acc": "exact_match"},
    "generate_until": {"exact_match": "exact_text"},
}
# lm_eval cuts a generation at `until` and takes it as it is, unless a filter says otherwise.
_PLAIN_FILTERS = ({"function": "take_first"},)
_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LM_EVAL_MAX_TOKENS = 256
_MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Which task, and how lm_eval is to build it; the defaults are lm_eval's."""

    task: str
    python: Path = Path(sys.executable)
    include_path: Path | None = None
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    metrics: tuple[str, ...] = ()
    """The task's metrics to carry over; empty for all."""
    id: str | None = None
    tags: tuple[str, ...] = ()
    cluster: str | None = None


def read_task(request: TaskRequest) -> dict[str, Any]:
    """What lm_eval builds of a task, as JSON.

    Raises:
        UsageError: lm_eval is not installed, knows no such task, or could not build it.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "task.json"
        asked = {
            "task": request.task,
            "include_path": str(request.include_path) if request.include_path else None,
            "num_fewshot": request.num_fewshot,
            "fewshot_seed": request.fewshot_seed,
            "out": str(out),
        }
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(asked), encoding="utf-8")
        try:
            done = subprocess.run(
                [str(request.python), str(Path(lm_eval_process.__file__)), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise UsageError(f"--python {request.python}: {error.strerror}.") from error
        if done.returncode or not out.is_file():
            tail = "\n  ".join(done.stderr.strip().splitlines()[-6:])
            raise UsageError(f"lm_eval could not build the task {request.task!r}:\n  {tail}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    _raise_failure(found, request)
    return found


def import_task(built: Mapping[str, Any], request: TaskRequest, *, name: str) -> ImportedSet:
    """A golden set of what `read_task` found.

    Raises:
        GoldenSetError: every part of the task that cannot be carried over, by name; or a document
            whose answer is none of its choices, by its number.
    """
    refused = list(_refusals(built, request.metrics))
    if refused:
        raise GoldenSetError(f"{built['task']}: cannot be carried over:\n  " + "\n  ".join(refused))
    source = f"{built['task']}, document "
    rows = tuple(
        (document["number"], _item(document, built, request, source=source, name=name))
        for document in built["documents"]
    )
    kept = [spec["metric"] for spec in _kept_metrics(built, request.metrics)]
    metadata = {
        "lm_eval": {
            "version": built["lm_eval"],
            "task": built["task"],
            "task_version": built["version"],
            "dataset": [part for part in built["dataset"] if part],
            "split": built["split"],
            "num_fewshot": built["num_fewshot"],
            "fewshot_seed": request.fewshot_seed if built["num_fewshot"] else None,
            "target_delimiter": built["target_delimiter"],
            "metrics": {metric: _METRICS[built["output_type"]][metric] for metric in kept},
        }
    }
    return ImportedSet(
        task=_task(built, kept, name),
        rows=rows,
        source=source,
        origin=f"the task `{built['task']}` of lm_eval {built['lm_eval']}, "
        f"{built['num_fewshot']} examples before each question"
        + (f" (seed {request.fewshot_seed})" if built["num_fewshot"] else "")
        + ", as plain text",
        metadata=metadata,
    )


def _raise_failure(found: Mapping[str, Any], request: TaskRequest) -> None:
    match found.get("failure"):
        case "not installed" if found["module"] == "lm_eval":
            raise UsageError(
                f"{request.python} has no lm_eval. Write: {INSTALL}, or name the Python of an "
                "environment that has it: --python ENV/bin/python."
            )
        case "not installed":
            raise UsageError(
                f"{request.python}: lm_eval needs the module {found['module']!r}, which is not "
                f"installed. Write: {INSTALL}."
            )
        case "unknown task":
            raise UsageError(
                f"lm_eval has no task {request.task!r}; name one of `lm_eval ls tasks`, or a YAML "
                "file, or say --include-path FOLDER."
            )
        case "group":
            raise UsageError(
                f"{request.task} is a group of {len(found['tasks'])} tasks; import them one at a "
                f"time: {', '.join(found['tasks'][:8])}."
            )


def _refusals(built: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[str]:
    output_type = built["output_type"]
    if output_type not in _METRICS:
        yield f"output_type {output_type}: only {' and '.join(_METRICS)} are judged item by item"
        return
    if built["process_results"]:
        yield f"process_results {built['process_results']}: a scorer of the task's own"
    if built["doc_to_image"] or built["doc_to_audio"]:
        yield "doc_to_image, doc_to_audio: only text is asked"
    if built["has_several_contexts"]:
        yield "doc_to_text is an index: a context per choice, but an item has one input"
    if built["repeats"] != 1:
        yield f"repeats {built['repeats']}: every item is asked once, greedily"
    yield from _refused_metrics(built, metrics)
    for pipeline in built["filter_list"] or []:
        functions = pipeline["filter"]
        if any(function not in _PLAIN_FILTERS for function in functions):
            names = ", ".join(str(function["function"]) for function in functions)
            yield f"filter {pipeline['name']} ({names}): outputs are scored as they are"
    if output_type == "generate_until":
        yield from _refused_generation(built["generation_kwargs"] or {})


def _refused_metrics(built: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[str]:
    known = _METRICS[built["output_type"]]
    theirs = [str(spec["metric"]) for spec in built["metric_list"]]
    for name in metrics:
        if name not in theirs:
            yield f"--metrics {name}: the task has {', '.join(theirs)}"
    for spec in _kept_metrics(built, metrics):
        name = str(spec["metric"])
        if name not in known:
            others = [other for other in theirs if other in known]
            hint = f"; leave it out with --metrics {','.join(others)}" if others else ""
            yield f"metric {name}: quantgate computes {', '.join(known)}{hint}"
            continue
        if spec.get("aggregation", "mean") != "mean" or spec.get("higher_is_better", True) is False:
            yield f"metric {name}: aggregation {spec.get('aggregation')}; expected the mean"
        options = {
            key: value
            for key, value in spec.items()
            if key not in ("metric", "aggregation", "higher_is_better")
            and value not in (False, None)
        }
        if options:
            said = ", ".join(f"{key}: {value}" for key, value in options.items())
            yield f"metric {name} with {said}: outputs are compared as they are"


def _refused_generation(kwargs: Mapping[str, Any]) -> Iterator[str]:
    if kwargs.get("do_sample") or (
        kwargs.get("do_sample") is None and float(kwargs.get("temperature") or 0)
    ):
        yield "generation_kwargs do_sample: a gate compares greedy answers"
    known = ("until", "do_sample", "temperature", *_MAX_TOKENS_NAMES)
    for key in kwargs:
        if key not in known:
            yield f"generation_kwargs {key}: expected {', '.join(known)}"
    if len(_until(kwargs)) > _MAX_STOP_STRINGS:
        yield f"generation_kwargs until: the server stops at {_MAX_STOP_STRINGS} strings at most"


def _kept_metrics(built: Mapping[str, Any], metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [spec for spec in built["metric_list"] if not metrics or spec["metric"] in metrics]


def _until(kwargs: Mapping[str, Any]) -> list[str]:
    until = kwargs.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _task(built: Mapping[str, Any], metrics: Sequence[str], name: str) -> dict[str, Any]:
    known = _METRICS[built["output_type"]]
    task: dict[str, Any] = {"task": name, "output_type": built["output_type"]}
    if built["output_type"] == "multiple_choice":
        task["doc_to_choice"] = "choices"
    else:
        kwargs = built["generation_kwargs"] or {}
        # In lm_eval's own order of preference, where a task says more than one.
        limits = [kwargs[key] for key in _MAX_TOKENS_NAMES if kwargs.get(key) is not None]
        task["generation_kwargs"] = {
            "max_gen_toks": int(limits[0]) if limits else _LM_EVAL_MAX_TOKENS,
            "until": _until(kwargs),
        }
        task["validity"] = [{"type": "non_empty"}, {"type": "finished"}]
    return task | {"metric_list": [{"metric": known[metric]} for metric in metrics]}


def _item(
    document: Mapping[str, Any],
    built: Mapping[str, Any],
    request: TaskRequest,
    *,
    source: str,
    name: str,
) -> dict[str, Any]:
    where = f"{source}{document['number']}"
    item: dict[str, Any] = {"id": f"{name}-{document['number']:05}"}
    if request.id:
        item["id"] = str(_field(document, request.id, where))
    if built["output_type"] == "multiple_choice":
        item |= _choice_fields(document, where)
    else:
        item |= {"input": document["requests"][0][0], "target": _generated_target(document, where)}
    tags = [f"{tag}:{_field(document, tag, where)}" for tag in request.tags]
    if tags:
        item["tags"] = tags
    if request.cluster:
        item["cluster"] = str(_field(document, request.cluster, where))
    return item


def _choice_fields(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Prompt and continuations, cut where lm_eval cuts them.

    Source: LM._encode_pair in lm_eval/api/model.py: white space that ends the context is scored
    with the continuation, since it belongs to the word that follows.
    """
    contexts = {context for context, _ in document["requests"]}
    if len(contexts) != 1:
        raise GoldenSetError(f"{where}: {len(contexts)} contexts; expected one input.")
    (context,) = contexts
    prompt = context.rstrip()
    choices = [context[len(prompt) :] + choice for _, choice in document["requests"]]
    return {"input": prompt, "target": choices[_gold(document, where)], "choices": choices}


def _gold(document: Mapping[str, Any], where: str) -> int:
    """The position of the known answer: lm_eval takes a position, or the choice itself."""
    target, choices = _single(document["target"], where), document["choices"]
    if isinstance(target, str):
        if target in choices:
            return int(choices.index(target))
    elif isinstance(target, int) and 0 <= target < len(choices):
        return target
    raise GoldenSetError(f"{where}: target {target!r} is none of the choices {choices!r}.")


def _generated_target(document: Mapping[str, Any], where: str) -> str:
    target = _single(document["target"], where)
    return str(document["choices"][target] if document["choices"] else target)


def _single(target: Any, where: str) -> Any:
    if isinstance(target, list):
        if len(target) != 1:
            raise GoldenSetError(f"{where}: {len(target)} known answers; expected one.")
        return target[0]
    return target


def _field(document: Mapping[str, Any], name: str, where: str) -> Any:
    value = document["fields"].get(name)
    if value is None or value == "":
        there = ", ".join(document["fields"])
        raise GoldenSetError(f"{where}: no text or number {name!r}; the document has {there}.")
    return value
