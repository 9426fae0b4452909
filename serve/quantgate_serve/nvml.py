"""Reads one NVIDIA device through NVML, and from Hopper on its performance monitor (GPM).

Utilisation is the share of time in which any kernel ran; how full the SMs were, and how busy the
memory, only GPM tells. What a device, a driver or a permission does not give is None.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at a device. Ratios are 0 to 1; None where the device does not tell."""

    utilization_ratio: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    sm_clock_hertz: float | None = None
    # Since the last reading.
    sm_active_ratio: float | None = None
    sm_occupancy_ratio: float | None = None
    tensor_active_ratio: float | None = None
    dram_active_ratio: float | None = None


GPU_FIELDS = tuple(item.name for item in fields(GpuReading))


def open_gpu(uuid: str | None) -> "Gpu | None":
    """The device with torch's `uuid`, or None where there is none, no driver, or no binding."""
    if uuid is None:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return Gpu(pynvml, _handle(pynvml, uuid))
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


def _handle(nvml: Any, uuid: str) -> Any:
    # torch leaves NVML's prefix out.
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return nvml.nvmlDeviceGetHandleByUUID(name)


class Gpu:
    """One device. Not thread-safe: one thread reads it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        # A part of a device has no clock, power and temperature of its own: NVML says so itself.
        self._gpm = self._open_monitor()

    def read(self) -> GpuReading:
        """Look at the device now; ratios of the monitor are since the last look."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        power_mw = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        clock_mhz = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        rates = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        monitored = {} if self._gpm is None else self._gpm.read()
        return GpuReading(
            utilization_ratio=None if rates is None else rates.gpu / 100,
            memory_used_bytes=None if memory is None else float(memory.used),
            memory_total_bytes=None if memory is None else float(memory.total),
            power_watts=None if power_mw is None else power_mw / 1000,
            temperature_celsius=self._ask(
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            ),
            sm_clock_hertz=None if clock_mhz is None else clock_mhz * 1e6,
            **monitored,
        )

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError:
            return None

    def _open_monitor(self) -> "_Monitor | None":
        nvml = self._nvml

        def find() -> _Monitor | None:
            if nvml.nvmlDeviceIsMigDeviceHandle(self._handle):
                parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle)
                instance = nvml.nvmlDeviceGetGpuInstanceId(self._handle)
            else:
                parent, instance = self._handle, None
            if not nvml.nvmlGpmQueryDeviceSupport(parent).isSupportedDevice:
                return None
            return _Monitor(nvml, parent, instance)

        found: _Monitor | None = self._ask(find)
        return found


class _Monitor:
    """GPM needs two samples and tells what happened between them."""

    def __init__(self, nvml: Any, device: Any, mig_instance: int | None) -> None:
        self._nvml = nvml
        self._device = device
        self._mig_instance = mig_instance
        self._metrics = {
            nvml.NVML_GPM_METRIC_SM_UTIL: "sm_active_ratio",
            nvml.NVML_GPM_METRIC_SM_OCCUPANCY: "sm_occupancy_ratio",
            nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: "tensor_active_ratio",
            nvml.NVML_GPM_METRIC_DRAM_BW_UTIL: "dram_active_ratio",
        }
        self._before = nvml.nvmlGpmSampleAlloc()
        self._after = nvml.nvmlGpmSampleAlloc()
        self._sample(self._before)

    def read(self) -> dict[str, float]:
        """The ratios since the last reading; without those that the device does not have."""
        nvml = self._nvml
        try:
            self._sample(self._after)
            request = nvml.c_nvmlGpmMetricsGet_t()
            request.version = nvml.NVML_GPM_METRICS_GET_VERSION
            request.numMetrics = len(self._metrics)
            request.sample1, request.sample2 = self._before, self._after
            for slot, metric in enumerate(self._metrics):
                request.metrics[slot].metricId = metric
            nvml.nvmlGpmMetricsGet(request)
        except nvml.NVMLError:
            return {}
        self._before, self._after = self._after, self._before
        return {
            name: request.metrics[slot].value / 100
            for slot, name in enumerate(self._metrics.values())
            if request.metrics[slot].nvmlReturn == nvml.NVML_SUCCESS
        }

    def _sample(self, sample: Any) -> None:
        if self._mig_instance is None:
            self._nvml.nvmlGpmSampleGet(self._device, sample)
        else:
            self._nvml.nvmlGpmMigSampleGet(self._device, self._mig_instance, sample)
