"""The engine's side of the socket: loads the model, warms up, steps, and reports to the front.

Runs in a process of its own (engine_process.py), or for a debugger in a thread of the front's.
"""

from collections.abc import Sequence
from time import monotonic

import torch

from quantgate_serve.admission import (
    QueueFullError,
    RequestTooLongError,
    TooManyAtOnceError,
)
from quantgate_serve.channel import (
    Abort,
    Channel,
    Counts,
    Ended,
    Loaded,
    Logprob,
    Message,
    Refused,
    Start,
    StepReport,
    Stop,
    Submit,
    Warm,
    plain_logprobs,
    progress,
    request_of,
)
from quantgate_serve.device_memory import free_device_bytes
from quantgate_serve.engine import Engine, Step
from quantgate_serve.loading import UnsupportedModelError
from quantgate_serve.request import FinishReason, Request, RequestError, RequestState
from quantgate_serve.startup import build_engine, load_for_serving

# The counts are sent this often while there is work, first so long after its begin, and after the
# last step of it. They are also the sign of life.
COUNTS_INTERVAL_S = 0.1


def host(channel: Channel) -> None:
    """Load what the first message says, warm up and serve `channel`.

    Raises:
        ChannelClosedError: the front has ended.
    """
    start, *early = channel.receive(None)
    if not isinstance(start, Start):
        raise TypeError(f"the front's first message is {type(start).__name__}, expected Start")
    settings = start.settings
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        loaded = load_for_serving(settings.model, settings)
        engine = build_engine(loaded, settings)
        channel.send(
            Loaded(
                engine.limits,
                loaded.vocab_size,
                loaded.eos_ids,
                loaded.device.type,
                free_device_bytes(loaded.device),
                engine.metrics,
            )
        )
        engine.warm_up()
    except UnsupportedModelError as error:
        channel.send(Refused(str(error)))
        return
    channel.send(Warm())
    EngineHost(engine, channel).run(early)


class EngineHost:
    """Steps an engine for a front: mail in, one report out per step."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._requests: dict[int, Request] = {}
        # How many tokens of a streaming request, its prompt's included, the front has.
        self._told: dict[int, int] = {}
        self._refused: list[Request] = []
        # Counted as started by the front, and not started yet.
        self._at_once: set[int] = set()
        # Mail that can be taken only when they have.
        self._untaken: list[Message] = []
        # What the front has not been told of yet: told while the next step is computed.
        self._untold: Step | None = None
        self._next_counts_s = 0.0
        self._is_stopping = False

    def run(self, messages: Sequence[Message] = ()) -> None:
        """Take `messages`, then what arrives, until Stop.

        Raises:
            ChannelClosedError: the front has ended.
        """
        engine = self._engine
        self._take_all(messages)
        while not self._is_stopping:
            is_late = self._refused or (self._untaken and not self._at_once)
            idle_s = 0 if is_late else engine.idle_s()
            if idle_s is None:
                engine.rest()
            received = self._channel.receive(idle_s)
            if idle_s is None:
                # The counts that the work before ended with hold until then, so that the front is
                # not woken beside the first steps of a request.
                self._next_counts_s = monotonic() + COUNTS_INTERVAL_S
            self._take_all([*self._untaken, *received])
            if engine.has_work or self._refused:
                self._untold = engine.compute(self._tell if engine.overlaps else None)
                # A step that does not follow at once keeps nobody waiting.
                if not engine.overlaps or engine.idle_s() != 0:
                    self._tell()
                engine.note()
                self._send_counts()
        self._tell()

    def _tell(self) -> None:
        """Tell the front of the last step, unless that has been done."""
        if self._untold is None:
            return
        step, self._untold = self._untold, None
        report = self._report(step)
        if report is not None:
            self._channel.send(report)

    def _send_counts(self) -> None:
        """At times, and whenever nothing is left to do."""
        now = monotonic()
        if now >= self._next_counts_s or not self._engine.has_work:
            self._channel.send(Counts.of(self._engine.metrics))
            self._next_counts_s = now + COUNTS_INTERVAL_S

    def _take_all(self, messages: Sequence[Message]) -> None:
        """Take `messages` in order, up to requests that find the queue full too early."""
        self._untaken = []
        for at, message in enumerate(messages):
            if not self._take(message):
                self._untaken = list(messages[at:])
                return

    def _take(self, message: Message) -> bool:
        """False if it must be taken once more, after a step."""
        match message:
            case Submit():
                return self._submit(message)
            case Abort():
                found = [self._requests[id] for id in message.ids if id in self._requests]
                self._engine.abort(found, reason=message.reason)
            case Stop():
                self._is_stopping = True
            case _:
                raise TypeError(f"the front sent {type(message).__name__}, which is the engine's")
        return True

    def _submit(self, message: Submit) -> bool:
        requests = [request_of(values) for values in message.requests]
        try:
            self._engine.submit(requests)
        # The front counts the same queue a moment later, so it has refused these already; unless
        # it counts as started what has yet to start here.
        except (RequestTooLongError, TooManyAtOnceError, QueueFullError) as error:
            if self._at_once and isinstance(error, QueueFullError):
                return False
            for request in requests:
                request.error = RequestError(str(error), "engine_error")
                request.finish_reason = FinishReason.ERROR
                request.state = RequestState.FINISHED
            self._refused += requests
        self._requests |= {request.id: request for request in requests}
        if message.starts_at_once:
            self._at_once.update(request.id for request in requests)
        return True

    def _report(self, step: Step) -> StepReport | None:
        """What the front must hear of `step`; None if that is nothing."""
        ended = [*self._refused, *step.ended]
        self._refused = []
        started = [request.id for request in step.started]
        if self._at_once:
            started = [id for id in started if id not in self._at_once]
            self._at_once.difference_update(request.id for request in (*step.started, *ended))
        if not (started or step.grown or ended):
            return None
        report = StepReport(
            started,
            *([], [], {}, []),
            counts_follow=not self._engine.has_work,
        )
        for request in step.grown:
            if request.params.prompt_logprobs and request.id not in self._told:
                report.prompt_logprobs[request.id] = plain_logprobs(request.prompt_logprobs)
            if request.params.wants_logprobs:
                tokens, report.logprobs[request.id] = self._news(request)
            else:
                tokens = self._new_tokens(request)
            # One token, but for what a step that was not told of left.
            for token in tokens:
                report.ids.append(request.id)
                report.tokens.append(token)
        for request in ended:
            of_prompt = [] if request.id in self._told else request.prompt_logprobs
            report.ended.append(
                Ended(
                    request.id,
                    *self._news(request),
                    plain_logprobs(of_prompt),
                    progress(request),
                )
            )
            del self._requests[request.id]
            self._told.pop(request.id, None)
        return report

    def _news(self, request: Request) -> tuple[list[int], list[Logprob]]:
        """The output tokens that the front has not been told, with their log-probabilities."""
        tokens = self._new_tokens(request)
        told = request.num_output - len(tokens)
        # One for each output token, or none at all.
        return tokens, plain_logprobs(request.logprobs[told:])

    def _new_tokens(self, request: Request) -> list[int]:
        told = self._told.get(request.id) or len(request.prompt_ids)
        tokens = request.token_ids[told:]
        self._told[request.id] = told + len(tokens)
        return tokens
