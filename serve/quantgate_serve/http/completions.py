"""POST /v1/completions."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quantgate_serve.http import exchange, responses, sse
from quantgate_serve.http.bodies import CompletionBody
from quantgate_serve.http.prompts import parse_prompts
from quantgate_serve.http.service import Service


async def completions(service: Service, http: HttpRequest) -> Response:
    """Continue each prompt."""
    body, asked = await service.parse(CompletionBody, http)
    prompts = parse_prompts(body.prompt, vocab_size=service.vocab_size)
    ids = await service.encode(prompts, add_special_tokens=body.add_special_tokens, param="prompt")
    grammar = await service.grammar(body)
    requests = service.requests(body, ids, asked, max_tokens=body.max_tokens, grammar=grammar)
    if body.stream:
        form = sse.CompletionForm(service.vocabulary, body, service.model_name)
        return sse.EventStream(service.sharing, requests, form, usage_choices=body.usage_choices)
    await exchange.complete(service.sharing, requests, http)

    def answer() -> Response:
        choices = [
            responses.completion_choice(
                request,
                service.vocabulary,
                index=index,
                echo=body.echo,
                return_token_ids=body.return_token_ids,
                names_ids=body.return_tokens_as_token_ids,
            )
            for index, request in enumerate(requests)
        ]
        return responses.answer(
            choices,
            requests,
            envelope=responses.Envelope.new(
                prefix="cmpl", kind="text_completion", model_name=service.model_name
            ),
            num_choices=body.n,
        )

    return await service.build(answer, requests)
