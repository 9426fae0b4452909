"""A second opinion on the server's speed: Locust's users stream chats and completions.

    pip install locust && locust -f benchmarks/locustfile.py --host URL --headless -u 8 -r 8 -t 2m

Each user asks, reads the whole stream, thinks for a second on average, and asks again. At the end
it prints what Locust saw beside what the server's own /metrics say of the same time. Reported as
`request`: from sending to the end of the stream; as `first token`: to the first event with text.
"""

import json
import random
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import requests
from locust import HttpUser, events, task

QUESTIONS = (
    "How many boxes of nuts are on order 417?",
    "Please change my order to twelve packs of M6 bolts and send it to Leeds.",
    "What is the total of 3 crates of tea at 14.50 and 2 of coffee at 9.95?",
)
_HISTOGRAM = "quantgate_e2e_request_latency_seconds"
_seen: dict[str, Any] = {}


class Customer(HttpUser):
    """Streams, three completions to one chat."""

    def wait_time(self) -> float:
        """Exponential: arrivals are nearly a Poisson process while answers are short."""
        return random.expovariate(1.0)

    @task(3)
    def complete(self) -> None:
        self._stream("/v1/completions", {"prompt": random.choice(QUESTIONS)})

    @task(1)
    def chat(self) -> None:
        message = {"role": "user", "content": random.choice(QUESTIONS)}
        self._stream("/v1/chat/completions", {"messages": [message]})

    def _stream(self, path: str, body: dict[str, Any]) -> None:
        wanted = random.randint(16, 48)
        body |= {"max_tokens": wanted, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        started = perf_counter()
        with self.client.post(path, json=body, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return
            num_tokens, has_text = 0, False
            for event in _events(answer):
                if "error" in event:
                    answer.failure(event["error"]["message"])
                    return
                if not has_text and _text_of(event):
                    has_text = True
                    self._report_first_token(path, 1e3 * (perf_counter() - started))
                num_tokens = event.get("usage", {}).get("completion_tokens", num_tokens)
            # Locust stops its clock at the headers of a stream.
            answer.request_meta["response_time"] = 1e3 * (perf_counter() - started)
            if num_tokens != wanted:
                answer.failure(f"{num_tokens} tokens, {wanted} were asked for")
            else:
                _seen["tokens"] += num_tokens
                answer.success()

    def _report_first_token(self, path: str, elapsed_ms: float) -> None:
        self.environment.events.request.fire(
            request_type="first token",
            name=path,
            response_time=elapsed_ms,
            response_length=0,
            exception=None,
            context={},
        )


def _text_of(event: dict[str, Any]) -> str:
    choice = event["choices"][0] if event["choices"] else {}
    text: str = choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


@events.test_start.add_listener
def _note_start(environment: Any, **_: Any) -> None:
    _seen.update(tokens=0, started=perf_counter(), before=_scrape(environment.host))


@events.test_stop.add_listener
def _compare(environment: Any, **_: Any) -> None:
    elapsed_s = perf_counter() - _seen["started"]
    after = _scrape(environment.host)
    grown = {name: value - _seen["before"].get(name, 0.0) for name, value in after.items()}
    entries = [one for (_, kind), one in environment.stats.entries.items() if kind == "POST"]
    times = sorted(
        ms for one in entries for ms, count in one.response_times.items() for _ in range(count)
    )
    if not times:
        print("no request ended")
        return
    p95 = times[min(len(times) - 1, int(0.95 * len(times)))]
    tokens = grown["quantgate_generation_tokens_total"]
    print(f"{'':8}{'requests':>10}{'tok/s':>10}{'p95 ms':>14}")
    print(f"{'locust':8}{len(times):>10}{_seen['tokens'] / elapsed_s:>10.1f}{p95:>14.0f}")
    print(
        f"{'server':8}{grown[f'{_HISTOGRAM}_count']:>10.0f}{tokens / elapsed_s:>10.1f}"
        f"{_quantile(grown, 0.95):>14.0f}"
    )


def _scrape(host: str) -> dict[str, float]:
    """Sums over labels, but for the histogram's `le`, which stays in the name."""
    result: dict[str, float] = {}
    for line in requests.get(f"{host}/metrics", timeout=10).text.splitlines():
        if line.startswith("#"):
            continue
        series, value = line.rsplit(" ", 1)
        name, _, labels = series.partition("{")
        bound = labels.partition('le="')[2].partition('"')[0]
        key = f"{name}:{bound}" if bound else name
        result[key] = result.get(key, 0.0) + float(value)
    return result


def _quantile(grown: dict[str, float], share: float) -> float:
    """Milliseconds, as Prometheus' histogram_quantile estimates it: evenly within a bucket."""
    prefix = f"{_HISTOGRAM}_bucket:"
    buckets = sorted(
        (float(name.removeprefix(prefix)), count)
        for name, count in grown.items()
        if name.startswith(prefix)
    )
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            return 1e3 * (low + (bound - low) * (wanted - below) / max(1e-9, count - below))
        low, below = bound, count
    return float("nan")
