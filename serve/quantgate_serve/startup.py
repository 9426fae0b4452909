"""Puts an engine together: sizes the KV pool, wires storage, scheduler and runner."""

import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from transformers import AttentionInterface

from quantgate_serve import coded, fused_int8
from quantgate_serve.admission import AdmissionLimits
from quantgate_serve.attention import cuda_paged
from quantgate_serve.attention.decode_torch import (
    SPLIT_COUNTS,
    choose_splits,
    paged_decode_torch,
)
from quantgate_serve.attention.interface import ATTENTION_NAME, register
from quantgate_serve.attention.torch_paged import attend, paged_attention
from quantgate_serve.ceilings import forget_buffers, measure_ceilings, measure_copy
from quantgate_serve.config import ServerSettings
from quantgate_serve.cuda_runner import CudaRunner
from quantgate_serve.decoder import build_decoder
from quantgate_serve.engine import Engine
from quantgate_serve.graphs import capture_on_cuda
from quantgate_serve.huge_pages import collapse_weights
from quantgate_serve.kernels import Kernel, log_kernels, read_kernels
from quantgate_serve.kv.pool import PAGE_SIZE, PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import LoadedModel, UnsupportedModelError, choose_device, load
from quantgate_serve.metrics import EngineGauges, EngineMetrics
from quantgate_serve.model_cost import read_cost
from quantgate_serve.native.decoder import NativeDecoder
from quantgate_serve.native.int8 import find_int8_kernels
from quantgate_serve.native.layer import LayerKernels, find_kernels
from quantgate_serve.native.quantized import find_quantized_kernels
from quantgate_serve.native_runner import NativeRunner
from quantgate_serve.runner import Runner
from quantgate_serve.scheduler import Scheduler, SchedulerLimits
from quantgate_serve.step_meter import StepMeter

_log = logging.getLogger(__name__)
# Shares of the memory that is free after loading. A CPU server is one process among others.
_CUDA_SHARE = 0.85
_CPU_SHARE = 0.10
_CPU_MAX_TOKENS = 32_768


def load_for_serving(folder: Path, settings: ServerSettings) -> LoadedModel:
    """Load the model with our attention registered, and on a CPU find the shortest way through."""
    # First: beside loaded weights its buffers could become the most memory ever held.
    measure_copy(choose_device(settings.device), torch.get_num_threads())
    register(paged_attention)
    AttentionInterface.register(cuda_paged.ATTENTION_NAME, cuda_paged.cuda_attention)
    is_cuda = choose_device(settings.device).type == "cuda"
    loaded = load(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        attention=cuda_paged.ATTENTION_NAME if is_cuda else ATTENTION_NAME,
        max_context=settings.max_context,
    )
    # On CUDA the runner calls the model itself, in a form that can be recorded.
    if is_cuda:
        return loaded
    if loaded.dtype == torch.float32 and settings.native_kernels != "off":
        _fuse(loaded)
    decoder = build_decoder(loaded.model, attend, _kernels(loaded, settings))
    collapse_weights(decoder)
    return replace(loaded, model=decoder)


def _fuse(loaded: LoadedModel) -> None:
    """Quantized Linears by kernels in C, where there are some."""
    if loaded.quantization in ("gptq", "bitsandbytes-4bit"):
        coded.replace_all(loaded.model, find_quantized_kernels())
    elif loaded.quantization == "bitsandbytes-8bit":
        fused_int8.fuse_all(loaded.model, find_int8_kernels())


def build_engine(loaded: LoadedModel, settings: ServerSettings) -> Engine:
    """An engine over `loaded` that has not started yet."""
    metrics = EngineMetrics()
    _describe_device(metrics.now, loaded)
    kv_tokens = settings.kv_tokens or choose_kv_tokens(loaded, settings)
    pool = PagePool(kv_tokens // PAGE_SIZE)
    storage = KVStorage(
        loaded.kv_shape, num_pages=pool.num_pages, page_size=PAGE_SIZE, device=loaded.device
    )
    scheduler = Scheduler(
        pool,
        SchedulerLimits(
            max_batch_size=settings.max_batch_size,
            max_batched_tokens=settings.max_batched_tokens,
            aging_ns=int(settings.aging_s * 1e9),
            window_ns=int(settings.admission_window_ms * 1e6),
        ),
        prefix_cache=_prefix_cache(pool, settings),
    )
    metrics.now.weight_bytes = loaded.weight_bytes
    metrics.now.kv_bytes = storage.num_bytes
    limits = AdmissionLimits(
        context_length=loaded.context_length,
        max_request_tokens=min(loaded.context_length, pool.num_pages * PAGE_SIZE),
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        aging_s=settings.aging_s,
        max_batched_tokens=settings.max_batched_tokens,
    )
    kernels = read_kernels(loaded.model, loaded.device)
    log_kernels(kernels)
    metrics.now.kernel_linears = {kernel.name: kernel.count for kernel in kernels}
    metrics.now.slow_kernels = {k.name: k.slow for k in kernels if k.slow is not None}
    if loaded.device.type == "cuda":
        runner: Runner = build_cuda_runner(
            loaded, storage, metrics, kernels, max_batch_size=settings.max_batch_size
        )
    else:
        runner = _cpu_runner(loaded, storage, settings)
    meter = StepMeter(
        metrics,
        runner.clock,
        cost=read_cost(loaded.model, loaded.kv_shape),
        max_batch_size=settings.max_batch_size,
    )
    engine = Engine(
        runner,
        scheduler,
        metrics,
        limits=limits,
        device=loaded.device,
        check_integrity=settings.check_integrity,
        meter=meter,
    )
    engine.update_gauges()
    return engine


def _cpu_runner(loaded: LoadedModel, storage: KVStorage, settings: ServerSettings) -> Runner:
    if isinstance(loaded.model, NativeDecoder):
        return NativeRunner(loaded, storage, loaded.model)
    return Runner(loaded, storage, kernels=_kernels(loaded, settings))


def build_cuda_runner(
    loaded: LoadedModel,
    storage: KVStorage,
    metrics: EngineMetrics,
    kernels: tuple[Kernel, ...],
    *,
    max_batch_size: int,
) -> CudaRunner:
    """A runner with Triton's decode and recorded graphs; with neither where Triton is missing."""
    if find_spec("triton") is None:
        _log.warning("triton is not installed: decode gathers in plain torch, without CUDA graphs")
        return CudaRunner(
            loaded, storage, metrics, decode=paged_decode_torch, num_splits=lambda *_: 1
        )
    from quantgate_serve.attention.triton_paged import paged_decode

    multiprocessors = torch.cuda.get_device_properties(loaded.device).multi_processor_count
    runner = CudaRunner(
        loaded,
        storage,
        metrics,
        decode=paged_decode,
        num_splits=lambda batch, longest: choose_splits(
            batch, loaded.kv_shape.num_kv_heads, longest, multiprocessors
        ),
    )
    runner.compile_decodes(SPLIT_COUNTS)
    runner.record_graphs(kernels, max_batch_size=max_batch_size, capture=capture_on_cuda)
    return runner


def _kernels(loaded: LoadedModel, settings: ServerSettings) -> LayerKernels | None:
    """None for LLM.int8, too: it rounds activations, and there the last bit of one can move a token
    away from generate()'s (in 1 of 96 requests to a random model)."""
    if settings.native_kernels == "off" or loaded.quantization == "bitsandbytes-8bit":
        return None
    return find_kernels()


def _prefix_cache(pool: PagePool, settings: ServerSettings) -> PrefixCache | None:
    if not settings.prefix_cache:
        return None
    if settings.prefix_cache_tokens is None:
        return PrefixCache(pool)
    return PrefixCache(pool, max_pages=settings.prefix_cache_tokens // PAGE_SIZE)


def _describe_device(gauges: EngineGauges, loaded: LoadedModel) -> None:
    ceilings = measure_ceilings(loaded.device, loaded.dtype, torch.get_num_threads())
    forget_buffers(loaded.device)
    gauges.device_bytes_per_s, gauges.device_flops_per_s = ceilings
    if loaded.device.type == "cuda":
        gauges.device_uuid = str(torch.cuda.get_device_properties(loaded.device).uuid)


def choose_kv_tokens(loaded: LoadedModel, settings: ServerSettings) -> int:
    """As many tokens as a full batch of full contexts needs, or as memory allows.

    Raises:
        UnsupportedModelError: not even one page fits.
    """
    if loaded.device.type == "cuda":
        free_bytes = int(torch.cuda.mem_get_info(loaded.device)[0] * _CUDA_SHARE)
    else:
        free_bytes = int(psutil.virtual_memory().available * _CPU_SHARE)
    tokens = min(
        settings.max_batch_size * loaded.context_length,
        free_bytes // loaded.kv_shape.bytes_per_token,
    )
    if loaded.device.type == "cpu":
        tokens = min(tokens, max(_CPU_MAX_TOKENS, loaded.context_length))
    if tokens < PAGE_SIZE:
        raise UnsupportedModelError(
            f"{free_bytes} bytes are left for the KV cache, but one page of {PAGE_SIZE} tokens "
            f"takes {PAGE_SIZE * loaded.kv_shape.bytes_per_token}. "
            "Free memory or use a smaller variant."
        )
    return tokens
