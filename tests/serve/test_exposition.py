"""What a scrape of the server says, read back with Prometheus' own parser."""

from collections import Counter
from collections.abc import Callable

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from quantgate_serve.engine import Engine
from quantgate_serve.exposition import Exposition
from quantgate_serve.families import FAMILIES, PREFIX
from quantgate_serve.metrics import EngineMetrics, FrontMetrics
from quantgate_serve.nvml import GpuReading
from quantgate_serve.request import Request
from quantgate_serve.roofline import step_work

MakeRequest = Callable[..., Request]


def scrape(
    engine: EngineMetrics, front: FrontMetrics | None = None, *, also_vllm: bool = False
) -> dict[str, Metric]:
    made = Exposition("tiny", lambda: engine, front or FrontMetrics(), also_vllm=also_vllm)
    return {
        metric.name: metric for metric in text_string_to_metric_families(made.render().decode())
    }


def values(metric: Metric, suffix: str = "") -> dict[str, float]:
    """The samples by their own label, "" where there is none."""
    return {
        "".join(v for k, v in sample.labels.items() if k not in ("model_name", "engine")): (
            sample.value
        )
        for sample in metric.samples
        if sample.name.endswith(suffix)
    }


@pytest.fixture(scope="module")
def worked(
    request: pytest.FixtureRequest,
) -> EngineMetrics:
    metrics = EngineMetrics(prefix_queries=10, prefix_hits=4, cross_tenant_hits=0)
    metrics.now.num_waiting = {"interactive": 1, "bulk": 2}
    metrics.now.service_tokens_per_s = 800.0
    metrics.observe_wait("interactive", 0.003)
    metrics.observe_wait("bulk", 4.0)
    metrics.now.kv_pages, metrics.now.kv_pages_used, metrics.now.kv_pages_cached = 10, 8, 5
    metrics.finished["stop"] = 3
    return metrics


def test_every_family_has_a_name_of_its_own_and_a_type_that_fits_it() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        # iteration_tokens_total is a histogram in vLLM, too.
        is_total = family.name.endswith("_total") and family.name != "iteration_tokens_total"
        assert is_total == (family.kind == "counter"), family.name


def names_of(found: dict[str, Metric]) -> set[str]:
    """As the table has them; the parser takes a counter's ending off."""
    return {m.name + ("_total" if m.type == "counter" else "") for m in found.values()}


def test_a_scrape_has_each_family_that_exists_under_its_name_and_type(
    worked: EngineMetrics,
) -> None:
    found = scrape(worked)
    for family in FAMILIES:
        name = PREFIX + family.name
        metric = found.get(name.removesuffix("_total") if family.kind == "counter" else name)
        assert metric is None or metric.type == family.kind, family.name


def test_depth_and_wait_are_told_by_priority(worked: EngineMetrics) -> None:
    found = scrape(worked)
    assert values(found["quantgate_num_requests_waiting"]) == {"interactive": 1, "bulk": 2}
    counts = values(found["quantgate_request_queue_time_seconds"], "_count")
    assert counts == {"interactive": 1, "bulk": 1}


def test_reusable_cached_pages_do_not_count_as_used(worked: EngineMetrics) -> None:
    found = scrape(worked)
    assert values(found["quantgate_kv_cache_usage_perc"]) == {"": 0.3}
    assert values(found["quantgate_kv_cache_cached_perc"]) == {"": 0.5}


def test_what_does_not_exist_is_absent_not_0() -> None:
    found = scrape(EngineMetrics())
    assert "quantgate_prefix_cache_hits" not in found
    assert "quantgate_cuda_ooms" not in found
    assert "quantgate_slo_baseline" not in found, "nothing was promoted"
    assert "quantgate_kv_cache_usage_perc" not in found, "no pool, no share of it"
    assert values(found["quantgate_oom"]) == {"": 0}, "no OOM was met: that is known"


def test_the_oldest_wait_grows_while_the_engine_says_nothing() -> None:
    metrics = EngineMetrics()
    assert values(scrape(metrics)["quantgate_oldest_wait_seconds"]) == {"": 0}
    metrics.now.oldest_arrived_ns = 1
    first = values(scrape(metrics)["quantgate_oldest_wait_seconds"])[""]
    assert 0 < first < values(scrape(metrics)["quantgate_oldest_wait_seconds"])[""]


def test_vllm_names_are_exported_only_on_request_with_vllms_labels(worked: EngineMetrics) -> None:
    assert not any(name.startswith("vllm:") for name in scrape(worked))
    found = scrape(worked, also_vllm=True)
    for metric in found.values():
        for sample in metric.samples:
            if sample.name.startswith("vllm:"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
                assert "priority" not in sample.labels
    assert values(found["vllm:num_requests_waiting"]) == {"": 3}
    assert values(found["vllm:request_queue_time_seconds"], "_count") == {"": 2}
    assert values(found["vllm:request_queue_time_seconds"], "_sum") == {"": 4.003}
    assert values(found["vllm:request_success"]) == {"stop": 3}


def test_the_names_of_vllm_are_vllms() -> None:
    # From vllm/v1/metrics/loggers.py and vLLM's documentation of its metrics.
    known = {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "admission_rejections_total",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    }
    assert {family.name for family in FAMILIES if family.in_vllm} == known


# What a server has not that has no CUDA, serves no promoted variant, and had nobody wait.
ABSENT_ON_CPU = {
    PREFIX + family.name
    for family in FAMILIES
    if family.name.startswith(("gpu_", "cuda_", "slo_", "service_tokens_"))
}


def test_an_engine_that_worked_has_told_every_layer(
    make_engine: Callable[..., Engine],
    make_request: MakeRequest,
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
) -> None:
    engine = make_engine()
    caches = Counter({"response": 1, "embedding": 0})
    front = FrontMetrics(coalesced_requests=0, cache_queries=caches, cache_hits=caches)
    made = Exposition("tiny", lambda: engine.metrics, front)
    run_all(engine, [make_request(prompt) for prompt in prompts(6)])
    found = {m.name: m for m in text_string_to_metric_families(made.render().decode())}
    assert names_of(found) == {PREFIX + family.name for family in FAMILIES} - ABSENT_ON_CPU
    assert values(found["quantgate_request_success"]) == {"length": 6}
    assert values(found["quantgate_generation_tokens"]) == {"": 72}
    assert values(found["quantgate_request_queue_time_seconds"], "_count") == {"normal": 6}
    assert values(found["quantgate_num_requests_running"]) == {"": 0}
    assert values(found["quantgate_kv_cache_usage_perc"]) == {"": 0}
    assert values(found["quantgate_kv_cache_cached_perc"])[""] > 0
    assert values(found["quantgate_peak_memory_bytes"])[""] > 1e6
    fill = found["quantgate_batch_fill_ratio"]
    steps = values(found["quantgate_step_time_seconds"], "_count")[""]
    assert values(fill, "_count")[""] == steps
    assert 0 < values(fill, "_sum")[""] <= steps
    busy, model = (values(found[f"quantgate_{name}_seconds"])[""] for name in ("busy", "model"))
    assert 0 < model < busy
    assert values(found["quantgate_host_gap_ratio"])[""] == pytest.approx(1 - model / busy)
    rate = values(found["quantgate_work_bytes"])[""] / busy
    peak = values(found["quantgate_device_bytes_per_second"])[""]
    assert values(found["quantgate_mbu_ratio"])[""] == pytest.approx(rate / peak)


def test_the_work_of_an_engine_is_the_sum_of_its_steps(
    make_engine: Callable[..., Engine], make_request: MakeRequest
) -> None:
    engine = make_engine(max_batched_tokens=8)
    cost = engine._meter._cost
    assert cost is not None
    engine.submit([make_request([5] * 12, max_tokens=3)])
    while engine.has_work:
        engine.step()
    # Two chunks of the prompt, the second of which gives a token, and two decodes.
    steps = [([(0, 8)], 1), ([(8, 4)], 1), ([(12, 1)], 1), ([(13, 1)], 1)]
    work = [step_work(cost, chunks, num_rows=rows) for chunks, rows in steps]
    assert engine.metrics.work_bytes == sum(step.num_bytes for step in work)
    assert engine.metrics.work_flops == sum(step.num_flops for step in work)


def test_ratios_look_back_over_earlier_scrapes_and_are_absent_without_work() -> None:
    metrics = EngineMetrics(busy_s=2.0, model_s=1.0)
    made = Exposition("tiny", lambda: metrics, FrontMetrics())

    def gap() -> dict[str, Metric]:
        found = text_string_to_metric_families(made.render().decode())
        return {m.name: m for m in found if m.name == "quantgate_host_gap_ratio"}

    assert values(gap()["quantgate_host_gap_ratio"]) == {"": 0.5}
    metrics.busy_s, metrics.model_s = 4.0, 3.0
    assert values(gap()["quantgate_host_gap_ratio"]) == {"": 0.25}
    idle = EngineMetrics()
    assert "quantgate_host_gap_ratio" not in scrape(idle)
    assert "quantgate_mbu_ratio" not in scrape(idle)


def test_a_promoted_baseline_is_told_in_its_own_unit() -> None:
    front = FrontMetrics(slo_baselines={"e2e_ms.p95": 812.5})
    assert values(scrape(EngineMetrics(), front)["quantgate_slo_baseline"]) == {"e2e_ms.p95": 812.5}


def test_a_device_is_opened_by_its_uuid_and_what_it_does_not_tell_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str | None] = []

    class Device:
        def read(self) -> GpuReading:
            return GpuReading(utilization_ratio=0.99, sm_occupancy_ratio=0.24)

    def open_device(uuid: str | None) -> Device | None:
        opened.append(uuid)
        return Device()

    monkeypatch.setattr("quantgate_serve.exposition.open_gpu", open_device)
    metrics = EngineMetrics()
    metrics.now.device_uuid = "ab-cd"
    made = Exposition("tiny", lambda: metrics, FrontMetrics())
    for _ in range(2):
        found = {m.name: m for m in text_string_to_metric_families(made.render().decode())}
    assert opened == ["ab-cd"], "opened once"
    assert values(found["quantgate_gpu_sm_occupancy_ratio"]) == {"": 0.24}
    assert "quantgate_gpu_power_watts" not in found
