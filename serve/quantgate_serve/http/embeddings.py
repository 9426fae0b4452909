"""POST /v1/embeddings: the direction of the mean last hidden state of each input."""

import base64
from array import array

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from quantgate_serve.http import exchange, responses
from quantgate_serve.http.bodies import EmbeddingBody
from quantgate_serve.http.errors import invalid
from quantgate_serve.http.prompts import parse_prompts
from quantgate_serve.http.service import Service


async def embeddings(service: Service, http: HttpRequest) -> Response:
    """One vector of length 1 for each input; computed in the engine's batch like any prompt."""
    body, asked = await service.parse(EmbeddingBody, http)
    prompts = parse_prompts(body.input, vocab_size=service.vocab_size, param="input")
    ids = await service.encode(prompts, add_special_tokens=True, param="input")
    requests = service.embedding_requests(ids, asked)
    await exchange.complete(service.sharing, requests, http)
    vectors = [request.embedding or () for request in requests]
    size = len(vectors[0])
    if body.dimensions not in (None, size):
        raise invalid("dimensions", f"this model has {size}; leave it out.")
    num_tokens = sum(request.num_prompt for request in requests)
    return JSONResponse(
        {
            "object": "list",
            "model": service.model_name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": list(vector)
                    if body.encoding_format == "float"
                    else base64.b64encode(array("f", vector).tobytes()).decode(),
                }
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        },
        headers=responses.origin_headers(requests),
    )
