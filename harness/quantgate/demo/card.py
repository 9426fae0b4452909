"""Measures the shipped model on the golden sets and writes what it found: numbers and model card.

`python -m quantgate.demo.card`, then `python -m quantgate.demo.golden` for the cards of the sets.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantgate.demo.cards import REFERENCE_FILE, Reference, reference_line
from quantgate.demo.evaluate import TaskScore, score_samples
from quantgate.demo.golden import golden_samples
from quantgate.demo.language import FIRST_SEED, SEEDS_PER_SPLIT, TASKS, Sample

_MODEL = Path(__file__).parent / "model"

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# The order-desk demo model

A Llama of {parameters:,} parameters in FP32, trained on a made-up language so that a quantized copy
has quality to lose. It ships with quantgate's demo, tests and CI; it is of no use elsewhere.

| | |
|---|---|
| layers | {layers} of width {hidden}, MLP {mlp}, tied embeddings |
| heads | {heads} query, {kv_heads} key-value |
| context | {context:,} positions; trained on texts of up to 928 tokens |
| vocabulary | {vocabulary:,} byte-level BPE tokens, every digit its own token, `<|end|>` is EOS |
| data | `quantgate.demo.language`, training split, seeds {first_seed} to {last_seed:,} |
| seed | 17 |
| steps, tokens | {steps:,} steps, {tokens:,} tokens |
| last training loss | {losses} |
| time, hardware | {minutes:.0f} minutes on {hardware} |
| optimizer | AdamW, learning rate up to {rate}: warm-up, stable, linear decay |
| precision | FP32 weights, BF16 autocast |

## What it reaches on the golden sets

Exact match, teacher-forced, which equals greedy decoding; FP32.

{results}

{notes}
## How it was trained

{history}
## Rebuild

```
python -m quantgate.demo.train --out DIR --export-to DIR/model --minutes 90 --bf16 --compile
```

`--bf16` pays only where the CPU has BF16 instructions. On a GPU add `--device cuda`. The result is
another model of the same kind, not the same bits. `train_log.jsonl` is this model's log.
"""


def measure(folder: Path) -> Reference:
    """Score the model in `folder` on every golden set, whole and by tag."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    reference: Reference = {}
    for task in TASKS:
        samples = golden_samples(task)
        score = score_samples(model, tokenizer, samples, device="cpu", rows=8)
        if task == "prose":
            reference[task] = {"n": score.n, "perplexity": round(math.exp(score.nll), 3)}
        else:
            reference[task] = {
                "n": score.n,
                "exact_match": round(score.accuracy, 4),
                "by_tag": _by_tag(samples, score),
            }
    return reference


def model_card(folder: Path, reference: Reference, *, hardware: str, history: str) -> str:
    """The README.md of the model folder."""
    config = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "lr" in entry]
    last = steps[-1]
    losses = {k.removeprefix("loss_"): v for k, v in last.items() if k.startswith("loss_")}
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    rows = "".join(f"| {task} | {reference_line(reference, task)} |\n" for task in TASKS)
    return _CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        mlp=config["intermediate_size"],
        context=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        first_seed=FIRST_SEED["train"],
        last_seed=FIRST_SEED["train"] + SEEDS_PER_SPLIT - 1,
        steps=log[-1]["step"],
        tokens=log[-1]["tokens"],
        losses=", ".join(f"{task} {value}" for task, value in losses.items()),
        minutes=last["seconds"] / 60,
        hardware=hardware,
        rate=max(entry["lr"] for entry in steps),
        results="| task | reached |\n|---|---|\n" + rows,
        notes=_tag_table(reference),
        history=history,
    )


def _by_tag(samples: list[Sample], score: TaskScore) -> dict[str, list[float]]:
    hits: dict[str, list[bool]] = defaultdict(list)
    for made, right in zip(samples, score.right, strict=True):
        for tag in made.tags:
            hits[tag].append(right)
    return {tag: [round(sum(h) / len(h), 4), len(h)] for tag, h in sorted(hits.items())}


def _tag_table(reference: Reference) -> str:
    rows = [
        f"| {task} | `{tag}` | {share:.1%} | {n} |"
        for task, numbers in reference.items()
        for tag, (share, n) in numbers.get("by_tag", {}).items()
    ]
    return "\n".join(["| task | tag | exact match | items |", "|---|---|---|---|", *rows, ""])


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def main() -> None:
    """Command line: measure, then write the reference numbers and the model card."""
    parser = argparse.ArgumentParser(prog="python -m quantgate.demo.card", description=__doc__)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--hardware", required=True, help="what the model was trained on")
    parser.add_argument("--history", type=Path, required=True, help="Markdown: how it was trained")
    arguments = parser.parse_args()
    reference = measure(arguments.model)
    card: dict[str, Any] = {"hardware": arguments.hardware}
    card["history"] = arguments.history.read_text()
    _write(REFERENCE_FILE, json.dumps(reference, indent=1) + "\n")
    _write(arguments.model / "README.md", model_card(arguments.model, reference, **card))
    for task in TASKS:
        print(f"{task:8} {reference_line(reference, task)}")


if __name__ == "__main__":
    main()
