"""Calibration documents: JSON lines with a `text`, tokenised by the source's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import UsageError
from quantgate.files import sha256_of_bytes
from quantgate.variants.manifest import Calibration
from quantgate.variants.source import SourceModel


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Tokenised documents and where they came from."""

    texts: list[str]
    ids: list[list[int]]
    provenance: Calibration


def load_calibration(
    path: Path, source: SourceModel, *, max_documents: int, max_tokens: int
) -> CalibrationSet:
    """Reads the first `max_documents`, each cut at `max_tokens`.

    Raises:
        UsageError: no file, a line without text, or nothing left, with file and line.
    """
    from transformers import AutoTokenizer

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: calibration file cannot be read ({error.strerror}).") from error
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    texts = []
    # Not splitlines(): it also splits at separators that JSON strings may contain.
    for number, line in enumerate(decoded.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{path}:{number}: expected a JSON object with "text" ({error}).'
            ) from error
        if not isinstance(text, str) or not text:
            raise UsageError(f"{path}:{number}: text is empty; expected a document.")
        texts.append(text)
        if len(texts) == max_documents:
            break
    if not texts:
        raise UsageError(f"{path}: no documents; expected JSON lines with a text each.")
    tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens] for text in texts]
    return CalibrationSet(
        texts=texts,
        ids=ids,
        provenance=Calibration(
            path=path.name,
            sha256=sha256_of_bytes(data),
            num_documents=len(texts),
            num_tokens=sum(map(len, ids)),
        ),
    )
