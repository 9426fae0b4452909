"""A request as the front keeps it: tokens arrive from the engine, text and deltas leave.

Stop strings are found here, where there is text. What the engine produced after one is cut.
"""

from collections.abc import Sequence

from quantgate_serve.channel import Ended, Logprob, set_progress, token_logprobs
from quantgate_serve.request import Delta, FinishReason, Request


def grow(request: Request, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> bool:
    """Add tokens and text; True if a stop string ended it, which cuts what came after."""
    entries = token_logprobs(logprobs) if logprobs else []
    if request.text is None:
        request.token_ids += tokens
        request.logprobs += entries
        return False
    for index, token in enumerate(tokens):
        request.token_ids.append(token)
        request.logprobs += entries[index : index + 1]
        # The end token is counted, and is no text.
        if not (request.ended_by_eos and index == len(tokens) - 1):
            request.text.push(token)
        if request.text.is_stopped:
            return True
    return False


def end(request: Request, ended: Ended) -> None:
    """Take over the engine's account of the end, unless a stop string came before it."""
    request.prompt_logprobs += token_logprobs(ended.prompt_logprobs)
    set_progress(request, ended.progress)
    if grow(request, ended.tokens, ended.logprobs) or _stops_at_the_end(request):
        request.finish_reason = FinishReason.STOP
        request.ended_by_eos = False


def _stops_at_the_end(request: Request) -> bool:
    """Whether what was held back as half a character holds a stop string."""
    if request.text is None or request.error is not None:
        return False
    request.text.finish()
    return request.text.is_stopped


def tell(request: Request) -> None:
    """Let the listener hear what is new."""
    if request.listener is None:
        return
    text = ""
    if request.text is not None:
        if request.is_finished:
            request.text.finish()
        text = request.text.take(final=request.is_finished)
    request.listener(Delta(request, request.num_output, text, request.is_finished))
