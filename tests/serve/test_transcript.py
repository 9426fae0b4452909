"""A request as the front keeps it: its text, its tokens, and how it ended."""

from typing import Any

import pytest

from quantgate_serve import transcript
from quantgate_serve.channel import Ended, progress
from quantgate_serve.detokenize import TextStream
from quantgate_serve.request import FinishReason, Request, RequestState, SamplingParams
from quantgate_serve.vocabulary import Vocabulary


def ended_of(request: Request, tokens: list[int], reason: FinishReason) -> Ended:
    """The engine's account of the end."""
    copy = Request(request.prompt_ids, request.params, id=request.id)
    copy.state, copy.finish_reason = RequestState.FINISHED, reason
    return Ended(request.id, tokens, [], [], progress(copy))


@pytest.mark.parametrize("stop", ["\ufffd", "a\ufffd"])
def test_a_stop_string_in_what_was_held_back_is_why_a_request_ended(
    tokenizer: Any, stop: str
) -> None:
    """Half a character is text once no token follows: its answer must not say both."""
    vocabulary = Vocabulary(tokenizer)
    broken = next(t for t in range(len(tokenizer)) if vocabulary.token_text(t) == "\ufffd")
    params = SamplingParams(max_tokens=2, stop=(stop,))
    request = Request([5], params, text=TextStream(vocabulary.decode, stop=params.stop))
    (letter,) = vocabulary.encode("a", add_special_tokens=False)
    transcript.end(request, ended_of(request, [letter, broken], FinishReason.LENGTH))
    assert request.text is not None
    assert request.text.stop_reason == stop
    assert request.finish_reason is FinishReason.STOP
    assert request.text.text == "a\ufffd".removesuffix(stop)
