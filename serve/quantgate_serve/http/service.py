"""What the routes share: one engine, one vocabulary, the tenants, the limits of a body."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quantgate_serve.channel import Loaded
from quantgate_serve.client import EngineClient
from quantgate_serve.detokenize import TextStream
from quantgate_serve.exposition import Exposition
from quantgate_serve.http import responses
from quantgate_serve.http.bodies import ChatBody, CompletionBody, GenerationBody, RequestBody
from quantgate_serve.http.errors import ApiError, invalid
from quantgate_serve.http.exchange import ClientGoneError
from quantgate_serve.http.extensions import WHOLE_BODY
from quantgate_serve.http.prompts import MAX_PROMPTS, Prompts, check_token_ids, encode_texts
from quantgate_serve.http.protocol import (
    Body,
    check_logprobs,
    choose_seed,
    parse_body,
    parse_grammar,
    sampling_params,
)
from quantgate_serve.keys import EVERYBODY, Keyring, Tenant
from quantgate_serve.kv.roots import CacheRoots
from quantgate_serve.lives import Lives
from quantgate_serve.request import Priority, Request, SamplingParams
from quantgate_serve.sharing import Sharing
from quantgate_serve.vocabulary import Vocabulary

DEADLINE_HEADER = "x-request-deadline-ms"
# Positions with log-probabilities that are written into an answer on the event loop: some 5 ms.
_ENTRIES_AT_ONCE = 256
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client may cost before its request is even known."""

    max_body_bytes: int
    # From the first byte of a request's body to its last.
    body_timeout_s: float


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks, since when, and until when the answer is of use."""

    tenant: Tenant
    priority: Priority
    arrived_ns: int
    deadline_ns: int | None
    # The caller's W3C trace context, for spans.
    traceparent: str | None = None


class Service:
    """One model, as the routes see it."""

    def __init__(
        self,
        engine: EngineClient,
        vocabulary: Vocabulary,
        *,
        model_name: str,
        vocab_size: int,
        eos_ids: frozenset[int],
        limits: HttpLimits,
        keyring: Keyring | None = None,
        metrics_compat: str | None = None,
        sharing: Sharing,
    ) -> None:
        """Without a `keyring` everybody is one tenant without a name."""
        self.engine = engine
        self.sharing = sharing
        self.vocabulary = vocabulary
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.limits = limits
        self.exposition = Exposition(
            model_name, lambda: engine.metrics, engine.front, also_vllm=metrics_compat == "vllm"
        )
        self.lives = Lives()
        engine.on_ended.append(self.lives.add)
        self.is_draining = False
        self.created_s = responses.now_s()
        self._keyring = keyring
        self._roots = CacheRoots()
        # Tokenising is done here, so that a long prompt does not hold up the event loop.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    @property
    def is_ready(self) -> bool:
        return self.engine.is_warm and self.engine.is_alive and not self.is_draining

    @property
    def needs_key(self) -> bool:
        return self._keyring is not None

    def tenant(self, http: HttpRequest) -> Tenant:
        """Whose key `http` carries.

        Raises:
            ApiError: 401, no key, or one that is nobody's.
        """
        if self._keyring is None:
            return EVERYBODY
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        tenant = self._keyring.tenant_of(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            problem = "is not known" if key else "is missing: send Authorization: Bearer KEY"
            raise ApiError(
                401,
                f"the API key {problem}.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return tenant

    def check_operator(self, http: HttpRequest) -> None:
        """Refuse with a 403 who may not read what concerns all tenants."""
        if not self.tenant(http).operator:
            raise ApiError(
                403, "this page is for operators; use an operator's key.", code="operators_only"
            )

    async def parse(self, schema: type[Body], http: HttpRequest) -> tuple[Body, Asked]:
        """The body of `http`, from a tenant who may ask for it, for the model that is here."""
        arrived_ns = perf_counter_ns()
        tenant = self.tenant(http)
        body = parse_body(schema, await self._read(http))
        self.check_model(body.model)
        return body, _asked(body, tenant, http.headers, arrived_ns)

    async def encode(
        self, prompts: Prompts, *, add_special_tokens: bool, param: str
    ) -> list[list[int]]:
        """Token ids of each prompt; empty and hopelessly long ones are refused with a 400."""
        if prompts.texts is None:
            return prompts.token_ids or []
        started = perf_counter()
        found = await encode_texts(
            prompts.texts,
            partial(self.vocabulary.encode, add_special_tokens=add_special_tokens),
            in_thread=self.in_thread,
            max_tokens=self.engine.limits.max_request_tokens,
        )
        self.engine.front.tokenize_s.observe(perf_counter() - started)
        for ids in found:
            check_token_ids(ids, param=param, vocab_size=self.vocab_size)
        return found

    async def grammar(self, body: GenerationBody) -> str | None:
        """The grammar of the answer, None for free text; a schema may take long to compile."""
        if body.response_format is None:
            return None
        if not (self.eos_ids and self.vocabulary.is_fast):
            raise invalid(
                "response_format", "cannot be followed: the model has no end token or no fast "
                "tokenizer. Leave it out.",
            )  # fmt: skip
        return await self.in_thread(lambda: parse_grammar(body))

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Do `work` beside the event loop, one piece after another."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)

    async def build(self, work: Callable[[], Response], requests: Sequence[Request]) -> Response:
        """The answer that `work` makes: here, or where it takes long beside the event loop."""
        entries = sum(len(request.logprobs) + len(request.prompt_logprobs) for request in requests)
        return work() if entries <= _ENTRIES_AT_ONCE else await asyncio.to_thread(work)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def requests(
        self,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        asked: Asked,
        *,
        max_tokens: int,
        grammar: str | None,
    ) -> list[Request]:
        """One request for each choice of each prompt."""
        if body.logprob_token_ids:
            check_token_ids(
                body.logprob_token_ids, param="logprob_token_ids", vocab_size=self.vocab_size
            )
        if len(prompts) * body.n > MAX_PROMPTS:
            raise invalid("n", f"{len(prompts)} prompts times {body.n}: limit {MAX_PROMPTS}.")
        scored = sum(map(len, prompts)) if body.scores_prompt else 0
        check_logprobs(body, num_prompts=len(prompts), scored=scored, max_tokens=max_tokens)
        seed = choose_seed(body.seed)
        # All prompts have the same ones: what is made, sent and read is one for each choice.
        choices = [
            sampling_params(
                body, max_tokens=max_tokens, choice=choice, base_seed=seed, grammar=grammar
            )
            for choice in range(body.n)
        ]
        operation = "chat" if isinstance(body, ChatBody) else "text_completion"
        result = []
        for ids in prompts:
            for params in choices:
                needs_text = body.stream or params.stop
                text = TextStream(self.vocabulary.decode, stop=params.stop) if needs_text else None
                result.append(self._request(ids, params, asked, operation, text=text))
        return result

    def switch(self, vocabulary: Vocabulary, loaded: Loaded) -> None:
        """Other weights serve now, with this vocabulary."""
        self.vocabulary = vocabulary
        self.vocab_size, self.eos_ids = loaded.vocab_size, loaded.eos_ids
        self.engine.front.slo_baselines = dict(self.engine.settings.slo)
        self.sharing.forget()

    def embedding_requests(self, prompts: list[list[int]], asked: Asked) -> list[Request]:
        """One request for each input; it produces no token."""
        params = SamplingParams(max_tokens=0, embeds=True)
        return [self._request(ids, params, asked, "embeddings") for ids in prompts]

    def _request(
        self,
        ids: list[int],
        params: SamplingParams,
        asked: Asked,
        operation: str,
        *,
        text: TextStream | None = None,
    ) -> Request:
        return Request(
            prompt_ids=ids,
            params=params,
            eos_ids=self.eos_ids,
            text=text,
            arrived_ns=asked.arrived_ns,
            priority=asked.priority,
            tenant=asked.tenant.name,
            weight=asked.tenant.weight,
            deadline_ns=asked.deadline_ns,
            cache_root=self._roots.of(asked.tenant.name),
            operation=operation,
            traceparent=asked.traceparent,
        )

    async def _read(self, http: HttpRequest) -> bytes:
        """The body, refused with a 413 as soon as it is too large, with a 408 if it is slow.

        Raises:
            ApiError: refused.
            ClientGoneError: the client left before it had sent all of it.
        """
        body: bytes | None = http.scope["extensions"][WHOLE_BODY]()
        if body is None:
            body = await self._receive(http)
        limit = self.limits.max_body_bytes
        if body is None or len(body) > limit:
            raise ApiError(
                413,
                f"the body is larger than {limit} bytes.",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return body

    async def _receive(self, http: HttpRequest) -> bytes | None:
        """The body as it comes; None as soon as it is known to be too large."""
        limit = self.limits.max_body_bytes
        declared = http.headers.get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            return None
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                more = True
                while more and len(body) <= limit:
                    message = await http.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message["body"]
                    more = message["more_body"]
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive within {self.limits.body_timeout_s:g} s.",
                code="request_timeout",
                headers={"connection": "close"},
            ) from error
        return bytes(body)


def _asked(body: RequestBody, tenant: Tenant, headers: Headers, arrived_ns: int) -> Asked:
    name = body.priority or tenant.default_class
    if name not in tenant.classes:
        raise ApiError(
            403,
            f"priority {name!r} is not allowed for this key; allowed: {', '.join(tenant.classes)}.",
            param="priority",
            code="priority_not_allowed",
        )
    limits_ms = [] if body.deadline_ms is None else [body.deadline_ms]
    header = headers.get(DEADLINE_HEADER)
    if header is not None:
        limits_ms.append(_header_ms(header))
    return Asked(
        tenant=tenant,
        priority=Priority[name.upper()],
        arrived_ns=arrived_ns,
        deadline_ns=arrived_ns + int(min(limits_ms) * 1e6) if limits_ms else None,
        traceparent=headers.get("traceparent"),
    )


def _header_ms(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 86_400_000.0:
        raise invalid(DEADLINE_HEADER, f"{text!r}, expected milliseconds, from 1 to a day.")
    return value
