"""The requests that the front has taken on: counted in the queue, grown token by token, ended once.

Knows which engine owes a request, and nothing of how engines come and go.
"""

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from quantgate_serve import transcript
from quantgate_serve.admission import Admission, AdmissionLimits, QueueFullError
from quantgate_serve.channel import Abort, Counts, StepReport, token_logprobs
from quantgate_serve.engine_child import EngineChild
from quantgate_serve.metrics import FrontMetrics
from quantgate_serve.request import FinishReason, Request, RequestError, RequestState


class Ledger:
    """Every method is for the event loop's thread."""

    def __init__(self, front: FrontMetrics) -> None:
        # Called with each request that was queued, once, when it has ended.
        self.on_ended: list[Callable[[Request], None]] = []
        self._front = front
        # None until an engine has said how much it has room for.
        self._admission: Admission | None = None
        self._queued: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether the limits are known by which requests are admitted."""
        return self._admission is not None

    def limit(self, limits: AdmissionLimits) -> None:
        """Admit by `limits` from now on: another engine may have found room for another cache."""
        if self._admission is None:
            self._admission = Admission(limits)
        self._admission.limits = limits

    def enter(self, requests: Sequence[Request]) -> None:
        """Count `requests` in, all or none.

        Raises:
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        assert self._admission is not None
        try:
            self._admission.enter(requests)
        except QueueFullError as error:
            self._front.rejections[error.reason] += 1
            raise
        now = perf_counter_ns()
        for request in requests:
            request.queued_ns = now
            # Its text is made here, and a stop string in it ends it early.
            request.is_streaming = request.is_streaming or request.text is not None
            self._queued.add(request.id)

    def start(self, request: Request, now_ns: int) -> None:
        """`request` is computed from now on, and no longer queued."""
        # Known better at its end, but the front may end it first.
        request.scheduled_ns = now_ns
        self._leave_queue(request)

    def pace(self, counts: Counts) -> None:
        """Foresee waits by how fast the serving engine works."""
        if self._admission is not None:
            self._admission.tokens_per_s = counts.service_tokens_per_s
            self._admission.s_per_step = counts.service_s_per_step

    def take(self, child: EngineChild, report: StepReport) -> None:
        """Add what a step of `child` brought to its requests, and tell their listeners."""
        now = perf_counter_ns()
        for id in report.started:
            request = child.in_flight.get(id)
            if request is not None:
                self.start(request, now)
        stopped: list[Request] = []
        for id, token in zip(report.ids, report.tokens, strict=True):
            request = child.in_flight.get(id)
            if request is None or request.is_finished:
                continue
            logprobs = report.logprobs.get(id, []) if report.logprobs else []
            request.first_token_ns = request.first_token_ns or now
            request.last_token_ns = now
            started_ns = perf_counter_ns()
            if report.prompt_logprobs:
                request.prompt_logprobs += token_logprobs(report.prompt_logprobs.pop(id, ()))
            is_stopped = transcript.grow(request, [token], logprobs[:1])
            self._note_detokenized(request, started_ns)
            if is_stopped:
                self.end(request, FinishReason.STOP)
                stopped.append(request)
            if logprobs:
                del logprobs[0]
            transcript.tell(request)
        self.forget(child, stopped, FinishReason.STOP)
        for ended in report.ended:
            request = child.settle(ended.id)
            if request is not None:
                started_ns = perf_counter_ns()
                transcript.end(request, ended)
                self._note_detokenized(request, started_ns)
                self._leave_queue(request)
                self._note_end(request)
                transcript.tell(request)

    def end(self, request: Request, reason: FinishReason) -> None:
        """End `request` by the front's own decision."""
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.finished_ns = perf_counter_ns()
        self._leave_queue(request)
        self._note_end(request)

    def fail(self, requests: Sequence[Request], reason: str) -> None:
        """End `requests`, whose engine is lost, and tell their listeners why."""
        for request in requests:
            request.error = RequestError(f"{reason}. Send the request again.", "engine_failed")
            self.end(request, FinishReason.ERROR)
            transcript.tell(request)

    def expire(self, requests: Sequence[Request]) -> None:
        """End `requests`, whose deadlines have passed before any engine began with them."""
        for request in requests:
            seconds = (perf_counter_ns() - request.arrived_ns) / 1e9
            request.error = RequestError(
                f"the deadline passed while the request waited for the engine, after {seconds:.3f} "
                "s. Allow more time, or try again later.",
                "deadline_exceeded",
            )
            self._front.expired += 1
            self.end(request, FinishReason.ERROR)
            transcript.tell(request)

    def forget(self, child: EngineChild, requests: Sequence[Request], reason: FinishReason) -> None:
        """Have `child` work no longer on those of `requests` that it owes."""
        ids = [request.id for request in requests if child.settle(request.id)]
        if ids:
            child.send(Abort(ids, reason))

    def _note_detokenized(self, request: Request, started_ns: int) -> None:
        if request.text is not None:
            self._front.detokenize_s.observe((perf_counter_ns() - started_ns) / 1e9)

    def _note_end(self, request: Request) -> None:
        for note in self.on_ended:
            note(request)

    def _leave_queue(self, request: Request) -> None:
        if request.id in self._queued and self._admission is not None:
            self._queued.discard(request.id)
            self._admission.leave(request)
