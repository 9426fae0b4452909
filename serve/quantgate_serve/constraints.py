"""Constrained decoding: which tokens keep a request's text inside its grammar.

The state of a grammar follows from the request's output alone, so preemption and retries do not
touch it: what is kept here may be dropped at any time and is then computed again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantgate_serve.request import Request
from quantgate_serve.sampling import on_device
from quantgate_serve.structured import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_GRAMMARS = 64
_MAX_MATCHERS = 512


class Constraints:
    """Masks logits so that each request's next token stays inside its grammar."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._vocabulary: LLTokenizer | None = None
        # The least recently used is the first to go.
        self._fresh: OrderedDict[str, LLMatcher] = OrderedDict()
        self._matchers: OrderedDict[int, tuple[LLMatcher, int]] = OrderedDict()

    def mask(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """`logits` [N, V], or a copy in which the tokens that a grammar forbids are -inf.

        Raises:
            GrammarError: a grammar turned out to be too complex to follow.
        """
        rows = [row for row, r in enumerate(requests) if r.params.grammar is not None]
        if not rows:
            return logits
        allowed = np.zeros((len(rows), logits.shape[1]), dtype=np.bool_)
        for index, row in enumerate(rows):
            found = self._allowed(requests[row])[: logits.shape[1]]
            allowed[index, : len(found)] = found
        forbidden = torch.from_numpy(~allowed)
        if logits.device.type == "cuda":
            forbidden = forbidden.pin_memory().to(logits.device, non_blocking=True)
        at = on_device(rows, logits.device)
        return logits.index_copy(0, at, logits[at].masked_fill(forbidden, float("-inf")))

    def _allowed(self, request: Request) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Which token ids may come next, [V] or a little longer."""
        matcher = self._matcher(request)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {matcher.get_error()}")
        return np.unpackbits(bits, bitorder="little").astype(np.bool_)

    def _matcher(self, request: Request) -> "LLMatcher":
        """The matcher after all of the request's output."""
        matcher, num_read = self._matchers.pop(request.id, (None, 0))
        if matcher is None or num_read > request.num_output:
            matcher, num_read = self._copy_fresh(request.params.grammar or ""), 0
        unread = request.output_ids[num_read:]
        if unread and not matcher.consume_tokens(unread):
            raise GrammarError(f"the output has left its grammar: {matcher.get_error()}")
        self._matchers[request.id] = (matcher, request.num_output)
        if len(self._matchers) > _MAX_MATCHERS:
            self._matchers.popitem(last=False)
        return matcher

    def _copy_fresh(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = self._fresh.pop(grammar, None)
        if matcher is None:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
            if matcher.is_error():
                raise GrammarError(f"the grammar cannot be used: {matcher.get_error()}")
        self._fresh[grammar] = matcher
        if len(self._fresh) > _MAX_GRAMMARS:
            self._fresh.popitem(last=False)
        return matcher.deep_copy()

    def _read_vocabulary(self) -> "LLTokenizer":
        """llguidance's view of the tokenizer; takes about 1 s for 128 k tokens."""
        from llguidance import LLTokenizer

        raw = copy(self._tokenizer.backend_tokenizer)
        raw.no_padding()
        raw.no_truncation()
        return LLTokenizer(
            raw.to_str(), n_vocab=self._vocab_size, eos_token=sorted(self._eos_ids), slices=None
        )
