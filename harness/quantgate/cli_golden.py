"""`quantgate golden`: the commands about golden sets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantgate.cli_options import split_names, takes_options

if TYPE_CHECKING:
    from quantgate.quality.imported.columns import Columns
    from quantgate.quality.imported.folder import ImportedSet

golden_app = typer.Typer(
    help="Golden sets: bring them, lock them, check them.", no_args_is_help=True
)

OutOption = Annotated[
    Path, typer.Option("--out", help="Folder to write, golden_sets/<name>; it must be new.")
]
TagsOption = Annotated[
    str | None, typer.Option("--tags", help="Columns whose values become tags, comma-separated.")
]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", help="Column of the document or template of an item.")
]
IdOption = Annotated[
    str | None, typer.Option("--id", help="Column of unique ids; default: numbered.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnOptions:
    """Which columns of a table mean what."""

    out: OutOption
    prompt: Annotated[str, typer.Option("--prompt", help="Column of the question.")]
    answer: Annotated[str, typer.Option("--answer", help="Column of the known answer.")]
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices", help="Columns of one choice each, or one column with a JSON list."
        ),
    ] = None
    labels: Annotated[
        str | None, typer.Option("--labels", help="Column with a list of the choices' names.")
    ] = None
    tags: TagsOption = None
    id: IdOption = None
    cluster: ClusterOption = None
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = (
        False
    )
    delimiter: Annotated[
        str | None,
        typer.Option("--delimiter", help="Between question and choice; default: a space in text."),
    ] = None
    metrics: Annotated[
        str, typer.Option("--metrics", help="Scorers of task.yaml, comma-separated.")
    ] = "exact_match"
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Longest generated answer.", min=1)
    ] = 64
    until: Annotated[
        list[str] | None, typer.Option("--until", help="A text that ends an answer; repeatable.")
    ] = None

    def columns(self) -> Columns:
        from quantgate.quality.imported.columns import Columns

        return Columns(
            prompt=self.prompt,
            answer=self.answer,
            choices=tuple(split_names(self.choices) or ()),
            labels=self.labels,
            id=self.id,
            tags=tuple(split_names(self.tags) or ()),
            cluster=self.cluster,
            is_chat=self.chat,
            delimiter=self.delimiter,
            metrics=tuple(split_names(self.metrics) or ()),
            max_tokens=self.max_tokens,
            until=tuple(self.until or ()),
        )


@golden_app.command("from-csv")
@takes_options
def golden_from_csv(
    file: Annotated[Path, typer.Argument(help="CSV or TSV with a header line.")],
    options: ColumnOptions,
    separator: Annotated[
        str | None, typer.Option("--separator", help="Default: by the file's name.")
    ] = None,
) -> None:
    """Make a golden set of a table: one item per record.

    Example: quantgate golden from-csv faq.csv --out golden_sets/faq --prompt ask --answer reply
    """
    from quantgate.quality.imported.columns import import_table
    from quantgate.quality.imported.folder import checked_name
    from quantgate.quality.imported.table import read_csv

    name = checked_name(options.out)
    table = read_csv(file, separator=separator)
    _write(import_table(table, options.columns(), name=name), options.out)


@golden_app.command("from-jsonl")
@takes_options
def golden_from_jsonl(
    file: Annotated[Path, typer.Argument(help="JSON lines, as Dataset.to_json writes them.")],
    options: ColumnOptions,
) -> None:
    """Make a golden set of JSON lines; a column inside an object is written choices.text.

    Example: quantgate golden from-jsonl arc.jsonl --out golden_sets/arc --prompt question \\
    --answer answerKey --choices choices.text --labels choices.label
    """
    from quantgate.quality.imported.columns import import_table
    from quantgate.quality.imported.folder import checked_name
    from quantgate.quality.imported.table import read_jsonl

    name = checked_name(options.out)
    _write(import_table(read_jsonl(file), options.columns(), name=name), options.out)


@golden_app.command("from-lm-eval-task")
def golden_from_lm_eval_task(
    task: Annotated[str, typer.Argument(help="Name of a task, or its YAML file.")],
    out: OutOption,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="The task's metrics to keep; default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples before each question.", min=0)
    ] = None,
    fewshot_seed: Annotated[int, typer.Option("--fewshot-seed", help="As lm_eval's.")] = 1234,
    tags: TagsOption = None,
    id: IdOption = None,
    cluster: ClusterOption = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with tasks of your own.")
    ] = None,
    python: Annotated[
        Path, typer.Option("--python", help="A Python that has lm_eval.", show_default=False)
    ] = Path(sys.executable),
) -> None:
    """Make a golden set of an lm-evaluation-harness task, prompts and scoring as lm_eval's.

    What cannot be carried over (filters, scorers of the task's own) is refused by name.
    Example: quantgate golden from-lm-eval-task piqa --metrics acc --out golden_sets/piqa
    """
    from quantgate.quality.imported.folder import checked_name
    from quantgate.quality.imported.lm_eval_task import TaskRequest, import_task, read_task

    name = checked_name(out)
    request = TaskRequest(
        task=task,
        python=python,
        include_path=include_path,
        num_fewshot=num_fewshot,
        fewshot_seed=fewshot_seed,
        metrics=tuple(split_names(metrics) or ()),
        id=id,
        tags=tuple(split_names(tags) or ()),
        cluster=cluster,
    )
    _write(import_task(read_task(request), request, name=name), out)


def _write(found: ImportedSet, out: Path) -> None:
    from quantgate.quality.imported.folder import write_imported

    items = write_imported(found, out)
    typer.echo(f"{out}: {len(items):,} items\nNext: quantgate golden lock {out} --model MODEL")


@golden_app.command("lock")
def golden_lock(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer renders it.")],
) -> None:
    """Lock a golden set as it is now: from here on, any change makes its verdicts INVALID.

    Example: quantgate golden lock golden_sets/order-extract --model demo
    """
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.lock import write_lock
    from quantgate.quality.rendering import Renderer
    from quantgate.variants.source import open_source

    golden = load_golden_set(folder)
    source = open_source(model)
    renderer = Renderer(source.folder)
    rendering = renderer.describe(golden, renderer.render(golden))
    path = write_lock(golden, rendering, model=source.name)
    typer.echo(f"locked {len(golden.items)} items: {path}")


@golden_app.command("check")
def golden_check(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer renders it.")],
) -> None:
    """Compare a golden set with its lock; exit code 3 when it changed.

    Example: quantgate golden check golden_sets/order-extract --model demo
    """
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.lock import changes_since_lock, read_lock
    from quantgate.quality.rendering import Renderer
    from quantgate.variants.source import open_source

    golden = load_golden_set(folder)
    renderer = Renderer(open_source(model).folder)
    rendering = renderer.describe(golden, renderer.render(golden))
    changes = changes_since_lock(golden, rendering, read_lock(folder))
    if changes:
        typer.echo(f"{folder}: differs from its lock in {', '.join(changes)}", err=True)
        raise typer.Exit(3)
    typer.echo(f"{folder}: {len(golden.items)} items, unchanged")


@golden_app.command("rescore")
def golden_rescore(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    results: Annotated[Path, typer.Argument(help="runs/<release>/<variant>/<name>.parquet.")],
) -> None:
    """Score stored answers again; exit code 3 when a stored score or check differs.

    Example: quantgate golden rescore golden_sets/order-total runs/RELEASE/int8/order-total.parquet
    """
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.rescoring import rescore

    num_items, differences = rescore(load_golden_set(folder), results)
    for difference in differences:
        typer.echo(str(difference), err=True)
    if differences:
        raise typer.Exit(3)
    typer.echo(f"{results}: {num_items:,} answers score as stored")


@golden_app.command("stats")
def golden_stats(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    margin: Annotated[float, typer.Option(help="The drop to be shown, in pt.", min=0.01)] = 2.0,
    confidence: Annotated[float, typer.Option(help="Of one tail.", min=0.51, max=0.999)] = 0.95,
    power: Annotated[
        float, typer.Option(help="Of passing without a drop.", min=0.5, max=0.999)
    ] = 0.8,
) -> None:
    """Say which margin a golden set can resolve, and how many items are missing for one.

    Example: quantgate golden stats golden_sets/order-extract --margin 2
    """
    from collections import Counter

    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.scoring import BINARY_SCORERS
    from quantgate.statistics import binomial, clusters, noninferiority

    golden = load_golden_set(folder)
    n, share = len(golden.items), margin / 100
    sizes = list(Counter(item.cluster for item in golden.items).values())
    typer.echo(f"{golden.name}: {n:,} items in {len(sizes):,} clusters")
    for tag, count in sorted(golden.tag_counts().items()):
        typer.echo(f"  {tag}: {count:,} items")
    for spec in golden.task.metric_list:
        typer.echo(f"{spec.metric}, {confidence:.3g} confidence, {power:.3g} power:")
        if spec.metric in BINARY_SCORERS:
            for flips in (0.01, 0.02, 0.05, 0.1):
                found = noninferiority.resolvable_margin(
                    flips, n, confidence=confidence, power=power
                )
                needed = noninferiority.planned_items(
                    flips, share, confidence=confidence, power=power
                )
                typer.echo(
                    f"  {flips:.0%} of items differ: resolves {100 * found:.2f} pt; "
                    f"{margin:g} pt needs {needed:,} items, {_missing(needed - n)}"
                )
        else:
            effective = clusters.num_effective(sizes)
            best = binomial.upper_bound(0, effective, confidence=confidence)
            needed = binomial.trials_without_event(share, confidence=confidence)
            typer.echo(
                f"  without any difference: resolves {100 * best:.2f} pt; {margin:g} pt needs "
                f"{needed:,} equal clusters, and these weigh like {effective:.0f}; "
                f"{_missing(needed - int(effective))}"
            )


def _missing(count: int) -> str:
    return "none missing" if count <= 0 else f"{count:,} missing"
