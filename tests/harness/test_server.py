"""The server as a child process: one real start, and what is said when there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.errors import MeasurementError, ServerDied
from quantgate.server import Server, ServerOptions, last_lines, parse_counters, running_server
from quantgate.variants.source import demo_folder
from quantgate_serve.__main__ import _parser


def test_counters_are_summed_over_their_labels_and_comments_are_skipped() -> None:
    text = (
        "# HELP quantgate_oom_total Steps that ran out of memory.\n"
        "# TYPE quantgate_oom_total counter\n"
        'quantgate_oom_total{model_name="a b"} 1.0\n'
        'quantgate_oom_total{model_name="c"} 2.0\n'
        "\n"
        "quantgate_peak_memory_bytes 1.5e+09\n"
        'quantgate_step_seconds_bucket{le="+Inf"} 7\n'
    )
    assert parse_counters(text) == {
        "quantgate_oom_total": 3.0,
        "quantgate_peak_memory_bytes": 1.5e9,
        "quantgate_step_seconds_bucket": 7.0,
    }
    assert parse_counters("") == {}


def test_options_that_are_none_are_left_to_the_server() -> None:
    options = ServerOptions(device="cpu", threads=1, kv_tokens=4096)
    given = ["--device", "cpu", "--threads", "1", "--kv-tokens", "4096"]
    # Each request is computed: an arm must not find its warm-up, or another's answer.
    off = ["--no-prefix-cache", "--no-coalescing"]
    off += ["--response-cache-mib", "0", "--embedding-cache-mib", "0"]
    assert options.arguments() == [*given, *off]


def test_the_server_knows_every_option_that_the_harness_may_give_it() -> None:
    options = ServerOptions(
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch_size=2,
        max_batched_tokens=64,
        kv_tokens=4096,
        max_queued_requests=8,
        max_queued_tokens=4096,
        max_context=128,
        admission_window_ms=5.0,
        native_kernels="off",
        caches=True,
    )
    parsed = vars(_parser().parse_args(["--model", "folder", *options.arguments()]))
    names = [name for name in ServerOptions.__slots__ if name not in ("caches", "ready_timeout_s")]
    assert {name: parsed[name] for name in names} == {n: getattr(options, n) for n in names}
    assert (parsed["prefix_cache"], parsed["coalescing"]) == (True, True)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["cpu", "cuda:0"]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        **{
            name: st.integers(1, 1 << 20)
            for name in ("threads", "max_batch_size", "max_batched_tokens", "kv_tokens")
        },
    },
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(options=OPTIONS)
def test_nothing_but_caches_itself_turns_a_cache_on(options: dict[str, Any]) -> None:
    given_off = ServerOptions(**options).arguments()
    for flag in ("--no-prefix-cache", "--no-coalescing"):
        assert flag in given_off
    for flag in ("--response-cache-mib", "--embedding-cache-mib"):
        assert given_off[given_off.index(flag) + 1] == "0"
    given_on = ServerOptions(**options, caches=True).arguments()
    assert not any(argument.startswith("--no-") for argument in given_on)
    for flag in ("--response-cache-mib", "--embedding-cache-mib"):
        assert float(given_on[given_on.index(flag) + 1]) > 0


@pytest.mark.parametrize("caches", [False, True])
def test_a_server_answers_from_its_cache_only_where_caches_are_on(
    caches: bool, tmp_path: Path
) -> None:
    options = ServerOptions(threads=1, kv_tokens=1024, caches=caches)
    with running_server(demo_folder(), log=tmp_path / "server.log", options=options) as server:
        body = json.dumps({"prompt": [5, 6], "max_tokens": 3, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", data=body)
        origins = []
        for _ in range(2):
            with urllib.request.urlopen(request, timeout=60) as response:
                origins.append(response.headers["x-cache"])
        assert origins == [None, "hit" if caches else None]


def test_a_real_server_starts_answers_is_watched_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log" / "server.log"
    options = ServerOptions(threads=1, kv_tokens=1024, max_batch_size=2)
    with running_server(demo_folder(), log=log, options=options) as server:
        body = json.dumps({"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        assert server.oom_count() == 0
        assert server.peak_bytes() > 50e6
        server.check_alive()
        # It dies as a crash of its own would end it.
        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerDied, match=r"the server exited \(signal SIGKILL\)"):
            server.counters()
    assert server.process.poll() is not None


def test_a_server_that_exits_before_it_is_ready_says_its_last_log_lines(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(ServerDied, match=r"exited \(exit code") as caught,
        running_server(tmp_path / "no-model", log=log, options=ServerOptions()),
    ):
        pytest.fail("it has no model to serve")
    assert "no-model" in str(caught.value)


def test_a_server_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    options = ServerOptions(ready_timeout_s=0.0)
    with (
        pytest.raises(MeasurementError, match="was not listening in time") as caught,
        running_server(demo_folder(), log=log, options=options),
    ):
        pytest.fail("nothing is ready in no time")
    assert not isinstance(caught.value, ServerDied)


def test_a_process_that_lives_but_does_not_answer_is_no_death(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    server = Server(process, "http://127.0.0.1:9", tmp_path / "server.log")
    try:
        with pytest.raises(MeasurementError, match="/metrics does not answer") as caught:
            server.peak_bytes()
        assert not isinstance(caught.value, ServerDied)
    finally:
        server.stop()
    assert process.poll() is not None


def test_an_exit_code_is_told_apart_from_a_signal(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    log = tmp_path / "server.log"
    with pytest.raises(ServerDied, match=r"exit code 3\):\n  \(no log\)"):
        Server(process, "", log).check_alive()


def test_only_the_end_of_a_long_log_is_told(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(100)) + b"\xff\n")
    lines = last_lines(log).splitlines()
    assert len(lines) == 15
    assert lines[0] == "  line 86"
    log.write_text("", encoding="utf-8")
    assert last_lines(log) == "  (empty log)"
