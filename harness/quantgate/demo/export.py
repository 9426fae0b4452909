"""Writes the demo model's folder, one whole file at a time: no reader ever sees half a file."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def export_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    log: Iterable[dict[str, Any]],
) -> None:
    """Write weights in FP32 with tokenizer, chat template and training log into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        Path(draft, "train_log.jsonl").write_text(lines)
        for file in sorted(Path(draft).iterdir()):
            file.replace(folder / file.name)
