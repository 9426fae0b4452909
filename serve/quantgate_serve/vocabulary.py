"""Text to tokens and back, and chat messages to text, for one tokenizer."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self


class ChatTemplateError(Exception):
    """The messages cannot be rendered with this model's chat template."""


class Vocabulary:
    """What the server needs of a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The Rust tokenizer itself: a third of the time of the wrapper's decode.
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)
        # A growing text asks for its last token alone with each that comes (detokenize.py).
        self._decode_one = lru_cache(maxsize=65_536)(lambda token_id: self._decode([token_id]))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer of a model folder that the engine has accepted, or is about to judge."""
        import transformers

        return cls(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer is a Rust one, whose vocabulary can be read."""
        return self._fast is not None

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._decode_one(ids[0]) if len(ids) == 1 else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        if self._fast is not None:
            text: str = self._fast.decode(list(ids), skip_special_tokens=True)
            return text
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text for `messages`, ending where the assistant begins.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        # jinja2 raises its own family, and a template may raise anything through raise_exception.
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ChatTemplateError(
                "this model has no chat template. Use /v1/completions with a rendered prompt."
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def _token_text(self, token_id: int) -> str:
        if self._fast is not None:
            text: str = self._fast.decode([token_id], skip_special_tokens=False)
            return text
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))
