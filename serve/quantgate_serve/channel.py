"""What the front and the engine's process say to each other, and how it is written down.

The front tokenises, detokenises and counts the queue; the engine sees token ids only. One message
goes each way per engine step, however many requests it concerns.

Messages are pickled; what there is much of goes as flat lists and tuples. A step of 64 tokens takes
4 us to write and 5 us to read (marshal: 4 and 6). As a tuple per request it took 48 and 77, as a
dataclass per token 250 each. What each request waits for, its way to the engine and the end of it,
is plain values only: for a class or an enum pickle runs Python code on both sides, and beside a
model that uses the caches each piece of code costs. Both ends are one program on one socket pair
that no third party can open, which is what makes pickle safe here.
"""

import enum
import pickle
import select
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Self

from quantgate_serve.admission import AdmissionLimits
from quantgate_serve.caches import keep_last
from quantgate_serve.config import ServerSettings
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.request import (
    FinishReason,
    Origin,
    Priority,
    Request,
    RequestError,
    RequestState,
    SamplingParams,
    TokenLogprob,
)

# The length of what follows, and how it is read (_READING).
_HEADER = struct.Struct("<IB")
_READ_BYTES = 1 << 18

# The engine has no use for these, and token_ids is prompt_ids until there is output.
_FRONT_ONLY = ("listener", "text", "tokenized_ns", "queued_ns", "operation", "traceparent")
_ENGINE_ONLY = ("token_ids", "pages", "num_computed", "logprobs", "prompt_logprobs", "hidden_sum")
ASKED = tuple(f.name for f in fields(Request) if f.init and f.name not in _FRONT_ONLY)
PROGRESS = tuple(f.name for f in fields(Request) if not f.init and f.name not in _ENGINE_ONLY)

_asked = attrgetter(*ASKED)
_progress = attrgetter(*PROGRESS)
_ended_values = attrgetter("id", "tokens", "logprobs", "prompt_logprobs", "progress")
_params = attrgetter(*(f.name for f in fields(SamplingParams) if f.init))


# To a plain value and back.
_Writing = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _enum(members: Iterable[enum.Enum]) -> _Writing:
    """Without the enum's own property and call, which are Python code."""
    return attrgetter("_value_"), {member.value: member for member in members}.__getitem__


# The fields that are no plain values; None stays None.
_WRITING: dict[str, _Writing] = {
    # Requests that come together have the same ones: made once, and pickle writes them once.
    "params": (keep_last(_params), keep_last(lambda values: SamplingParams(*values))),
    "priority": _enum(Priority),
    "level": _enum(Priority),
    "state": _enum(RequestState),
    "origin": _enum(Origin),
    "finish_reason": _enum(FinishReason),
    "error": (attrgetter("message", "code"), lambda values: RequestError(*values)),
}
_IN_ASKED = [(at, *_WRITING[name]) for at, name in enumerate(ASKED) if name in _WRITING]
_IN_PROGRESS = [(at, *_WRITING[name]) for at, name in enumerate(PROGRESS) if name in _WRITING]

Logprob = tuple[int, float, tuple[tuple[int, float], ...], tuple[float, ...]]


class ChannelClosedError(Exception):
    """The other process has ended."""


@dataclass(slots=True)
class Start:
    """The first message: what to load."""

    settings: ServerSettings


@dataclass(slots=True)
class Submit:
    """Requests to queue, all or none, as tuples of their `ASKED` fields, in plain values."""

    requests: list[tuple[Any, ...]]
    # The engine owes nothing else, so the front counts it as started: that need not be reported.
    starts_at_once: bool = False


@dataclass(slots=True)
class Abort:
    """Requests to end now: their client left, or their stop string was found."""

    ids: list[int]
    reason: FinishReason


@dataclass(slots=True)
class Stop:
    """End after the current step."""


@dataclass(slots=True)
class Refused:
    """The model cannot be served at all; another attempt would not help."""

    reason: str


@dataclass(slots=True)
class Loaded:
    """The model is in memory: what the front needs to know of it. The warm-up follows."""

    limits: AdmissionLimits
    vocab_size: int
    eos_ids: frozenset[int]
    device_type: str
    # What is left on a CUDA device once this engine has all it takes; None on the CPU.
    free_device_bytes: int | None
    metrics: EngineMetrics


@dataclass(slots=True)
class Warm:
    """The engine takes requests."""


@dataclass(slots=True)
class Ended:
    """A request's end: what the front has not heard of yet, and its `PROGRESS` in plain values."""

    id: int
    tokens: list[int]
    logprobs: list[Logprob]
    prompt_logprobs: list[Logprob]
    progress: tuple[Any, ...]


@dataclass(slots=True)
class StepReport:
    """What one step changed."""

    # Computed for the first time, but for what the front has counted so already.
    started: list[int]
    # Column by column: request `ids[i]` got `tokens[i]` and goes on.
    ids: list[int]
    tokens: list[int]
    # By request, of the same tokens in the same order, where they were asked for.
    logprobs: dict[int, list[Logprob]]
    ended: list[Ended]
    # Nothing is left to compute: what was counted follows at once.
    counts_follow: bool
    # By request, of its prompt, with the first of its tokens, where they were asked for.
    prompt_logprobs: dict[int, list[Logprob]] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What the engine has counted so far.

    Its own message, behind the report that clients wait for, and read only by who asks: to write
    and to read it takes 0.2 ms each beside a model that uses the caches.
    """

    # An EngineMetrics, pickled.
    metrics: bytes
    # The two of its gauges by which waits are foreseen.
    service_tokens_per_s: float | None
    service_s_per_step: float | None

    @classmethod
    def of(cls, metrics: EngineMetrics) -> Self:
        now = metrics.now
        body = pickle.dumps(metrics, protocol=5)
        return cls(body, now.service_tokens_per_s, now.service_s_per_step)

    def read(self) -> EngineMetrics:
        """A copy of the reader's own."""
        metrics: EngineMetrics = pickle.loads(self.metrics)
        return metrics


Message = Start | Submit | Abort | Stop | Refused | Loaded | Warm | StepReport | Counts


def asked(request: Request) -> tuple[Any, ...]:
    """What the engine needs of `request`, in plain values."""
    values = list(_asked(request))
    for at, write, _ in _IN_ASKED:
        values[at] = write(values[at])
    return tuple(values)


def request_of(asked: Sequence[Any]) -> Request:
    """The engine's own copy of a request."""
    values = list(asked)
    for at, _, read in _IN_ASKED:
        values[at] = read(values[at])
    return Request(**dict(zip(ASKED, values, strict=True)))


def progress(request: Request) -> tuple[Any, ...]:
    """How far `request` is, in plain values."""
    values = list(_progress(request))
    for at, write, _ in _IN_PROGRESS:
        if values[at] is not None:
            values[at] = write(values[at])
    return tuple(values)


def set_progress(request: Request, progress: Sequence[Any]) -> None:
    """Have `request` be as far as the one whose `progress` this is."""
    values = list(progress)
    for at, _, read in _IN_PROGRESS:
        if values[at] is not None:
            values[at] = read(values[at])
    for name, value in zip(PROGRESS, values, strict=True):
        setattr(request, name, value)


def plain_logprobs(entries: Sequence[TokenLogprob]) -> list[Logprob]:
    return [(entry.token_id, entry.logprob, entry.top, entry.of_token_ids) for entry in entries]


def token_logprobs(plain: Sequence[Logprob]) -> list[TokenLogprob]:
    return [TokenLogprob(*entry) for entry in plain]


def frame(message: Message) -> bytes:
    """`message` as bytes with their length in front."""
    plain: Any
    if type(message) is StepReport:
        kind, plain = 1, _report_values(message)
    elif type(message) is Submit:
        kind, plain = 2, (message.requests, message.starts_at_once)
    else:
        kind, plain = 0, message
    body = pickle.dumps(plain, protocol=5)
    return _HEADER.pack(len(body), kind) + body


def _report_values(report: StepReport) -> tuple[Any, ...]:
    ended = [_ended_values(ended) for ended in report.ended]
    return (
        *(report.started, report.ids, report.tokens, report.logprobs, ended),
        report.counts_follow,
        report.prompt_logprobs,
    )


def _report_of(values: Sequence[Any]) -> StepReport:
    started, ids, tokens, logprobs, ended, *rest = values
    ends = [Ended(*one) for one in ended]
    return StepReport(started, ids, tokens, logprobs, ends, *rest)


# How a frame of each kind is read: kinds 1 and 2 hold a message's values instead of a message.
_READING: tuple[Callable[[Any], Message], ...] = (
    lambda message: message,
    _report_of,
    lambda values: Submit(*values),
)


class Frames:
    """Takes bytes as they arrive and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            found = pickle.loads(memoryview(self._buffer)[start + _HEADER.size : end])
            messages.append(_READING[kind](found))
            start = end
        del self._buffer[:start]
        return messages


class Channel:
    """The engine's end: never waits for the front to read.

    What the front has not read yet is kept here. It is bounded by what was admitted: a front that
    reads nothing submits nothing either.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._frames = Frames()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, message: Message) -> None:
        """Raises ChannelClosedError if nobody reads any more."""
        self._unsent += frame(message)
        self._flush()

    def receive(self, timeout_s: float | None) -> list[Message]:
        """What has arrived, waiting up to `timeout_s` (None: for ever) for the first message.

        Raises:
            ChannelClosedError: the front has ended.
        """
        if timeout_s != 0 or self._unsent:
            self._wait(timeout_s)
        messages: list[Message] = []
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError as error:
                raise ChannelClosedError("the front has ended") from error
            if not data:
                raise ChannelClosedError("the front has ended")
            messages += self._frames.feed(data)
            if len(data) < _READ_BYTES:
                return messages  # what has come since is told by the next call

    def _wait(self, timeout_s: float | None) -> None:
        writes = select.POLLOUT if self._unsent else 0
        self._poll.modify(self._socket, select.POLLIN | writes)
        self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        if self._unsent:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise ChannelClosedError("the front has ended") from error
