"""One request: what was asked, how far it is, what it has produced.

Only the scheduler moves a request from state to state; the engine appends tokens.
"""

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from quantgate_serve.detokenize import TextStream
from quantgate_serve.kv.prefix import DEFAULT_ROOT

_ids = itertools.count()


class RequestState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Priority(enum.IntEnum):
    """How urgent a request is; the smaller goes first."""

    INTERACTIVE = 0
    NORMAL = 1
    BULK = 2

    @property
    def label(self) -> str:
        """Its word in requests and metrics."""
        return self.name.lower()


class Origin(enum.StrEnum):
    """Where an answer comes from: computed for this client, for another at the time, or earlier."""

    COMPUTED = "computed"
    COALESCED = "coalesced"
    CACHED = "cached"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end.

    `num_logprobs` None asks for no log-probabilities; 0 for those of the chosen tokens only.
    `logprob_token_ids` asks for the raw log-probability of exactly these ids at each position.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    logprob_token_ids: tuple[int, ...] = ()
    # The text stays inside this grammar (see structured.py).
    grammar: str | None = None
    # Asks for no token but for the mean of the last hidden states over the prompt.
    embeds: bool = False
    # Whether the most likely tokens are all that is asked for; known once, since every step asks.
    is_plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_plain = (
            self.is_greedy
            and self.max_tokens > 0
            and self.grammar is None
            and not (self.wants_logprobs or self.reads_whole_prompt)
        )
        object.__setattr__(self, "is_plain", is_plain)

    @property
    def is_greedy(self) -> bool:
        # Below this the division by the temperature overflows; vLLM draws the line here too.
        return self.temperature < 1e-5 or self.top_k == 1

    @property
    def is_cut(self) -> bool:
        """Whether the unlikely tokens are left out of a draw."""
        return self.top_p < 1.0 or self.top_k > 0

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether something is wanted of each prompt token, which a reused page does not have."""
        return self.prompt_logprobs or self.embeds

    @property
    def wants_logprobs(self) -> bool:
        return self.num_logprobs is not None or bool(self.logprob_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw log-probabilities (before temperature) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    of_token_ids: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed; `code` is the word a client can act on."""

    message: str
    code: str


@dataclass(slots=True)
class Delta:
    """What a listener hears: the request has `num_output` tokens now; the last has `is_last`."""

    request: "Request"
    num_output: int
    text: str
    is_last: bool


Listener = Callable[[Delta], None]


@dataclass(slots=True, eq=False)
class Request:
    """A sequence on its way through the engine. `token_ids` is prompt and output together.

    What may be passed in is what was asked; the rest is progress. The engine's process works on a
    copy of the first part, and its progress is copied back (channel.py): a field added here
    travels by being in the right part.
    """

    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    # Who hears of it, and its text: never seen by the engine.
    listener: Listener | None = None
    text: TextStream | None = None
    # Streaming requests are heard after every step, the others once, at their end.
    is_streaming: bool = False
    priority: Priority = Priority.NORMAL
    # Who asks: shares inside a class are per tenant, and so are prefixes. Set from the API key.
    tenant: str = ""
    # The tenant's share beside the others of its class.
    weight: float = 1.0
    # When the answer is of no use any more, on the clock of perf_counter_ns; None never is.
    deadline_ns: int | None = None
    cache_root: str = DEFAULT_ROOT
    id: int = field(default_factory=lambda: next(_ids))
    arrived_ns: int = field(default_factory=perf_counter_ns)
    # What only the front books: a request is made of tokens, so it is when they are there; when it
    # was handed to the engine; and for spans what was asked and the caller's W3C trace context.
    tokenized_ns: int = field(default_factory=perf_counter_ns)
    queued_ns: int = 0
    operation: str = "text_completion"
    traceparent: str | None = None

    token_ids: list[int] = field(init=False)
    pages: list[int] = field(init=False, default_factory=list)
    num_computed: int = field(init=False, default=0)
    logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    # Sum of the last hidden states of the prompt tokens computed so far, when `embeds`.
    hidden_sum: NDArray[np.float32] | None = field(init=False, default=None)
    # Entry i belongs to prompt token i + 1; the first token has none.
    prompt_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    state: RequestState = field(init=False, default=RequestState.WAITING)
    num_cached: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    # Kept by the scheduler: the class it runs in (aging may raise it), its place among those that
    # have started, and how many of its tokens were computed or reused so far.
    level: Priority = field(init=False, default=Priority.NORMAL)
    seat: int = field(init=False, default=-1)
    num_served: int = field(init=False, default=0)
    # Of length 1, in FP32.
    embedding: tuple[float, ...] | None = field(init=False, default=None)
    origin: Origin = field(init=False, default=Origin.COMPUTED)
    finish_reason: FinishReason | None = field(init=False, default=None)
    error: RequestError | None = field(init=False, default=None)
    ended_by_eos: bool = field(init=False, default=False)
    scheduled_ns: int = field(init=False, default=0)
    first_token_ns: int = field(init=False, default=0)
    last_token_ns: int = field(init=False, default=0)
    finished_ns: int = field(init=False, default=0)

    @staticmethod
    def next_id() -> int:
        """An id that no other request of this process has."""
        return next(_ids)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.level = self.priority

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def cost(self) -> int:
        """Tokens that it may take to compute, prompt and output: what queues are counted in."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED
