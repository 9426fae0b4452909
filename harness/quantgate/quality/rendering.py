"""From golden items to token ids, with a variant's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantgate.errors import GoldenSetError
from quantgate.files import sha256_of_file, sha256_of_json
from quantgate.quality.golden import GoldenSet
from quantgate.quality.golden_items import GoldenItem

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# Where a call is no longer cheaper for having more: what they become still fits the caches.
_TEXTS_A_CALL = 64


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


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt before it is tokenised, and the line it comes from."""

    text: str
    where: str
    is_plain: bool
    """Not out of a chat template, which writes the special tokens itself."""

    def before(self, choice: str) -> _Text:
        return replace(self, text=self.text + choice)


class Renderer:
    """Renders items with the tokenizer of one model folder."""

    def __init__(self, folder: Path) -> None:
        # Slow to import, and only needed where text meets a model.
        from transformers import AutoTokenizer

        self.folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # By id; none of a tokenizer in Python, which may look behind one of them.
        self._added: dict[int, str] = {}
        if self._tokenizer.is_fast:
            added = self._tokenizer.added_tokens_decoder
            self._added = {id: token.content for id, token in added.items()}
        self._separators: dict[int, str | None] = {}

    def render(self, golden: GoldenSet) -> list[RenderedPrompt]:
        """Renders every item, in file order.

        Raises:
            GoldenSetError: chat messages without a chat template, or a choice that changes how the
                prompt before it is tokenised.
        """
        texts = self._texts_of(golden)
        prompts = self._encode(texts)
        choices: Sequence[tuple[tuple[int, ...], ...]] = [()] * len(texts)
        if golden.task.output_type == "multiple_choice":
            asked = [item.choices for item in golden.items]
            choices = self._encode_choices(texts, prompts, asked)
        return [
            RenderedPrompt(item=item, ids=tuple(ids), choice_ids=choice_ids)
            for item, ids, choice_ids in zip(golden.items, prompts, choices, strict=True)
        ]

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

    def _texts_of(self, golden: GoldenSet) -> list[_Text]:
        chats = [item for item in golden.items if item.messages is not None]
        rendered = iter(self._apply_template(chats, golden) if chats else ())
        return [
            _Text(
                (item.text or "") if item.messages is None else next(rendered),
                _where(item, golden),
                is_plain=item.messages is None,
            )
            for item in golden.items
        ]

    def _apply_template(self, items: Sequence[GoldenItem], golden: GoldenSet) -> list[str]:
        if not self._tokenizer.chat_template:
            raise GoldenSetError(
                f"{_where(items[0], golden)}: input is chat messages, but {self.folder} has no "
                "chat template. Write input as plain text, or save the template with the tokenizer."
            )
        texts: list[str] = self._tokenizer.apply_chat_template(
            [[dict(message) for message in item.messages or ()] for item in items],
            add_generation_prompt=True,
            tokenize=False,
        )
        return texts

    def _encode_choices(
        self,
        texts: Sequence[_Text],
        prompts: Sequence[list[int]],
        choices: Sequence[tuple[str, ...]],
    ) -> list[tuple[tuple[int, ...], ...]]:
        """The tokens of each prompt's choices, after the prompt's.

        A choice is tokenised together with the text before it: alone it may get other tokens. What
        stands behind an added token is tokenised by itself, so that prompts with the same one at
        their end, as a chat template has, share what each choice becomes.
        """
        ends = [self._end_of(text, ids) for text, ids in zip(texts, prompts, strict=True)]
        # By choice, and by the added token before it or else by the prompt's number.
        places: dict[tuple[str, str | int], int] = {}
        for at, offered in enumerate(choices):
            for choice in offered:
                places.setdefault((choice, ends[at] or at), at)
        wholes = self._encode([texts[at].before(choice) for (choice, _), at in places.items()])
        found = {
            place: _continuation(prompts[at], whole, place[0], texts[at].where)
            for (place, at), whole in zip(places.items(), wholes, strict=True)
        }
        return [
            tuple(found[choice, ends[at] or at] for choice in offered)
            for at, offered in enumerate(choices)
        ]

    def _end_of(self, text: _Text, ids: Sequence[int]) -> str | None:
        """The added token that `text` of a chat template ends with; None where it has none."""
        end = self._separator(ids[-1]) if ids and not text.is_plain else None
        return end if end is not None and text.text.endswith(end) else None

    def _separator(self, token: int) -> str | None:
        """The text of an added token that parts what is before it from what is behind it.

        None for other tokens, and where a longer added token could begin before it.
        """
        if token not in self._separators:
            text = self._added.get(token)
            longer = text is None or any(text in t and t != text for t in self._added.values())
            self._separators[token] = None if longer else text
        return self._separators[token]

    def _encode(self, texts: Sequence[_Text]) -> list[list[int]]:
        """The tokens of each text, many in a call: the tokenizer's way through Python takes longer
        than its work on one text, and its threads share the texts of a call."""
        found: list[list[int]] = [[]] * len(texts)
        for is_plain in (True, False):
            alike = [at for at, text in enumerate(texts) if text.is_plain is is_plain]
            for start in range(0, len(alike), _TEXTS_A_CALL):
                group = alike[start : start + _TEXTS_A_CALL]
                encoded = self._tokenizer(
                    [texts[at].text for at in group],
                    add_special_tokens=is_plain,
                    return_attention_mask=False,
                )
                for at, ids in zip(group, encoded["input_ids"], strict=True):
                    found[at] = ids
        return found


def _where(item: GoldenItem, golden: GoldenSet) -> str:
    return f"{golden.folder}/items.jsonl:{item.line}"


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
