"""Every Linear's kernel is named, and slow or uncapturable ones say why."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from quantgate_serve.engine import Engine
from quantgate_serve.graphs import why_not
from quantgate_serve.kernels import Kernel, kernel_of, log_kernels, read_kernels
from quantgate_serve.metrics import EngineGauges

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


def test_plain_linears_are_counted_by_type(config_of: Callable[..., Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of(transformers.LlamaConfig))
    assert read_kernels(model, CPU) == (Kernel("torch Linear float32", 2 * 7 + 1),)


def test_conv1d_of_gpt2_and_experts_are_found(config_of: Callable[..., Any]) -> None:
    gpt2 = transformers.AutoModelForCausalLM.from_config(config_of(transformers.GPT2Config))
    assert Kernel("transformers Conv1D float32", 8) in read_kernels(gpt2, CPU)
    config = config_of(transformers.MixtralConfig, num_local_experts=4)
    mixtral = transformers.AutoModelForCausalLM.from_config(config)
    reason = why_not(read_kernels(mixtral, CUDA))
    assert reason is not None
    assert reason.startswith("transformers MixtralExperts: which experts compute")


def test_bitsandbytes_kernels_name_their_kind_device_and_outliers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four = bitsandbytes.nn.Linear4bit(
        64, 64, quant_type="nf4", compute_dtype=torch.float32, device="meta"
    )
    on_cpu, on_cuda = kernel_of(four, CPU), kernel_of(four, CUDA)
    assert on_cpu == Kernel("bitsandbytes nf4 on cpu, float32")
    assert on_cuda is not None
    assert on_cuda.slow == "it computes in FP32: load it with --dtype bfloat16"
    half = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
    assert kernel_of(half, CUDA) == Kernel("bitsandbytes nf4 on cuda, bfloat16")


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_only_llm_int8_with_outliers_keeps_a_graph_away(threshold: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=threshold)
    reason = why_not(read_kernels(nn.Sequential(linear), CUDA))
    assert (reason is not None) == (threshold > 0)
    if reason is not None:
        assert "looks for outliers (threshold 6) on the host" in reason


class TorchLinear(nn.Module):
    """Named as GPTQModel's kernel without a kernel."""

    bits = 4


class MarlinLinear(TorchLinear):
    """Named as GPTQModel's fast one."""


@pytest.mark.parametrize(("kind", "is_slow"), [(TorchLinear, True), (MarlinLinear, False)])
def test_gptqmodels_fallback_is_slow_on_cuda_only(kind: type[nn.Module], is_slow: bool) -> None:
    kind.__module__ = "gptqmodel.nn_modules.qlinear.x"
    found = kernel_of(kind(), CUDA)
    assert found is not None
    assert found.name == f"gptqmodel {kind.__name__} 4 bit"
    assert (found.slow is not None) == is_slow
    on_cpu = kernel_of(kind(), CPU)
    assert on_cpu is not None
    assert on_cpu.slow is None


def test_a_slow_kernel_is_a_warning_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_kernels([Kernel("fast", 3), Kernel("crawling", 2, slow="it crawls: buy another")])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "3 Linears by fast"),
        ("WARNING", "2 Linears by crawling: slow, it crawls: buy another"),
    ]


def test_slow_linears_are_those_of_slow_kernels() -> None:
    gauges = EngineGauges(kernel_linears={"fast": 3, "crawling": 2}, slow_kernels={"crawling": "x"})
    assert gauges.slow_linears == 2


def test_an_engine_exports_its_kernels(
    make_engine: Callable[..., Engine], llama_folder: Path
) -> None:
    now = make_engine(llama_folder).metrics.now
    assert sum(now.kernel_linears.values()) >= 1
    assert (now.slow_kernels, now.slow_linears) == ({}, 0)
    assert now.graph_bytes is None
