"""From golden items to token ids, with a variant's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import GoldenSetError
from quantgate.files import sha256_of_file, sha256_of_json
from quantgate.quality.golden import GoldenSet
from quantgate.quality.golden_items import GoldenItem

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """One item as the model sees it. `choice_ids` are continuations, one per choice."""

    item: GoldenItem
    ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What turns text into tokens, and what came out: part of the lock."""

    tokenizer_sha256: str
    chat_template_sha256: str | None
    prompts_sha256: str


class Renderer:
    """Renders items with the tokenizer of one model folder."""

    def __init__(self, folder: Path) -> None:
        # Slow to import, and only needed where text meets a model.
        from transformers import AutoTokenizer

        self.folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def render(self, golden: GoldenSet) -> list[RenderedPrompt]:
        """Renders every item, in file order.

        Raises:
            GoldenSetError: chat messages without a chat template, or a choice that changes how the
                prompt before it is tokenised.
        """
        return [self._render_item(item, golden) for item in golden.items]

    def describe(self, golden: GoldenSet, prompts: Sequence[RenderedPrompt]) -> Rendering:
        files = {
            name: sha256_of_file(self.folder / name)
            for name in _TOKENIZER_FILES
            if (self.folder / name).is_file()
        }
        template = self._tokenizer.chat_template
        by_id = sorted((p.item.id, list(p.ids), [list(c) for c in p.choice_ids]) for p in prompts)
        return Rendering(
            tokenizer_sha256=sha256_of_json(files),
            chat_template_sha256=sha256_of_json(template) if template else None,
            prompts_sha256=sha256_of_json(by_id),
        )

    def _render_item(self, item: GoldenItem, golden: GoldenSet) -> RenderedPrompt:
        where = f"{golden.folder}/items.jsonl:{item.line}"
        is_text = item.messages is None
        text = (item.text or "") if item.messages is None else self._apply_template(item, where)
        choices = item.choices if golden.task.output_type == "multiple_choice" else ()
        # Tokenised together with the text before it: a choice alone may get other tokens. In one
        # call: the tokenizer's way through Python takes ten times as long as its work on one text.
        ids, *wholes = self._encode([text, *(f"{text}{c}" for c in choices)], special=is_text)
        return RenderedPrompt(
            item=item,
            ids=tuple(ids),
            choice_ids=tuple(
                _continuation(ids, whole, choice, where)
                for whole, choice in zip(wholes, choices, strict=True)
            ),
        )

    def _apply_template(self, item: GoldenItem, where: str) -> str:
        if not self._tokenizer.chat_template:
            raise GoldenSetError(
                f"{where}: input is chat messages, but {self.folder} has no chat template. "
                "Write input as plain text, or save the template with the tokenizer."
            )
        text: Any = self._tokenizer.apply_chat_template(
            [dict(m) for m in item.messages or ()], add_generation_prompt=True, tokenize=False
        )
        return str(text)

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        return ids


def _continuation(
    prompt: Sequence[int], whole: Sequence[int], choice: str, where: str
) -> tuple[int, ...]:
    """The tokens of `whole` after the prompt's."""
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise GoldenSetError(
            f"{where}: choice {choice!r} changes the tokens of the prompt before it. End the "
            "input with a character that starts a new token, such as a newline."
        )
    return tuple(whole[len(prompt) :])
