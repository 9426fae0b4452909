"""The child process that asks lm-evaluation-harness for a task: PYTHON lm_eval_process.py REQUEST.

It runs in whichever environment has lm_eval, which need not have quantgate, and a task may run code
of its own. Imports nothing of quantgate; writes what lm_eval built as JSON and judges nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        write(request, {"failure": "not installed", "module": error.name})
        return
    include = request["include_path"]
    is_file = Path(request["task"]).suffix in (".yaml", ".yml")
    # Indexing the tasks that lm_eval brings takes seconds, and a file names none of them.
    manager = TaskManager(include_path=include, include_defaults=not is_file)
    if not is_file and request["task"] not in manager.all_tasks:
        write(request, {"failure": "unknown task"})
        return
    tasks = manager.load([request["task"]])["tasks"]
    if len(tasks) != 1:
        write(request, {"failure": "group", "tasks": sorted(tasks)})
        return
    (task,) = tasks.values()
    # As lm_eval's own evaluator: a task that says 0 is never given examples.
    if task.config.num_fewshot is None or (
        request["num_fewshot"] is not None and task.config.num_fewshot != 0
    ):
        task.set_config("num_fewshot", request["num_fewshot"] or 0)
    task.set_fewshot_seed(request["fewshot_seed"])
    task.build_all_requests()
    described = {"lm_eval": lm_eval.__version__, **describe(task)}
    write(request, described | {"documents": list(documents(task))})


def describe(task: Any) -> dict[str, Any]:
    """The task's configuration, with the name of each function instead of the function."""
    config = task.config
    return {
        "task": config.task,
        "version": (config.metadata or {}).get("version"),
        "output_type": task.OUTPUT_TYPE,
        "num_fewshot": config.num_fewshot,
        "target_delimiter": config.target_delimiter,
        "dataset": [config.dataset_path, config.dataset_name],
        "split": config.test_split or config.validation_split,
        "metric_list": named(config.metric_list or [{"metric": m} for m in task._metric_fn_list]),
        "filter_list": named(config.filter_list),
        "generation_kwargs": named(config.generation_kwargs),
        "process_results": named(config.process_results),
        "doc_to_image": named(config.doc_to_image),
        "doc_to_audio": named(config.doc_to_audio),
        "should_decontaminate": config.should_decontaminate,
        "repeats": config.repeats,
        "has_several_contexts": bool(task.multiple_input),
    }


def documents(task: Any) -> Iterator[dict[str, Any]]:
    """Per document: what lm_eval asks, the known answer, and the fields that are plain."""
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    for number, instances in by_document.items():
        doc = instances[0].doc
        yield {
            "number": number,
            # A generation's second argument is the task's generation_kwargs, said once above.
            "requests": [[a for a in one.args if isinstance(a, str)] for one in instances],
            "target": task.doc_to_target(doc),
            "choices": task.doc_to_choice(doc) if task.config.doc_to_choice is not None else [],
            "fields": {k: v for k, v in doc.items() if isinstance(v, (str, int, float))},
        }


def named(value: Any) -> Any:
    """JSON of a configuration: a function or class becomes its name in brackets."""
    if isinstance(value, dict):
        return {str(key): named(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(part) for part in value]
    if callable(value):
        return f"<{getattr(value, '__name__', type(value).__name__)}>"
    return value


def write(request: dict[str, Any], value: dict[str, Any]) -> None:
    Path(request["out"]).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main()
