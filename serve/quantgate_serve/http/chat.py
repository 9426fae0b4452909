"""POST /v1/chat/completions."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quantgate_serve.http import exchange, responses, sse
from quantgate_serve.http.bodies import ChatBody
from quantgate_serve.http.errors import invalid
from quantgate_serve.http.prompts import Prompts
from quantgate_serve.http.protocol import MAX_LOGPROB_VALUES, plain_messages
from quantgate_serve.http.service import Service
from quantgate_serve.vocabulary import ChatTemplateError


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """Answer the messages."""
    body, asked = await service.parse(ChatBody, http)
    messages = plain_messages(body.messages)
    try:
        text = await service.in_thread(lambda: service.vocabulary.render_chat(messages))
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from error
    # The template writes the special tokens itself.
    (ids,) = await service.encode(Prompts([text], None), add_special_tokens=False, param="messages")
    grammar = await service.grammar(body)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = _default_max_tokens(service, body, num_prompt=len(ids))
    requests = service.requests(body, [ids], asked, max_tokens=max_tokens, grammar=grammar)
    if body.stream:
        form = sse.ChatForm(service.vocabulary, body, service.model_name)
        return sse.EventStream(service.sharing, requests, form, usage_choices=body.usage_choices)
    await exchange.complete(service.sharing, requests, http)

    def answer() -> Response:
        choices = [
            responses.chat_choice(
                request, service.vocabulary, index=index, return_token_ids=body.return_token_ids
            )
            for index, request in enumerate(requests)
        ]
        return responses.answer(
            choices,
            requests,
            envelope=responses.Envelope.new(
                prefix="chatcmpl", kind="chat.completion", model_name=service.model_name
            ),
            num_choices=body.n,
        )

    return await service.build(answer, requests)


def _default_max_tokens(service: Service, body: ChatBody, *, num_prompt: int) -> int:
    """What the context leaves, or as far as the log-probabilities of all choices may go."""
    left = service.engine.limits.max_request_tokens - num_prompt
    if body.logprobs_per_position:
        left = min(left, MAX_LOGPROB_VALUES // (body.n * body.logprobs_per_position))
    return max(1, left)
