"""NVML and GPM: what a device tells, what it does not, and no device at all.

The driver is a stand-in (no GPU here); structures, constants and errors are pynvml's own.
"""

import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from quantgate_serve.nvml import GPU_FIELDS, Gpu, GpuReading, open_gpu


class Driver:
    """pynvml over one device that answers as an H100 does, but for what is `missing`."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *, missing: tuple[str, ...] = (), has_gpm: bool = True, mig: bool = False):
        self.missing = missing
        self.has_gpm = has_gpm
        self.mig = mig
        self.samples: list[str] = []
        self.uuid = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)  # constants and structures

    def answer(self, name: str, value: Any) -> Any:
        if name in self.missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuid = uuid
        return "device"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self.answer("memory", SimpleNamespace(used=3 * 2**30, total=80 * 2**30))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> Any:
        return self.answer("power", 345_600)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> Any:
        assert kind == pynvml.NVML_CLOCK_SM
        return self.answer("clock", 1980)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self.answer("rates", SimpleNamespace(gpu=99, memory=41))

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> Any:
        return self.answer("temperature", 61)

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:
        return self.mig

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "parent"

    def nvmlDeviceGetGpuInstanceId(self, handle: str) -> int:
        return 7

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:
        return self.answer("gpm", SimpleNamespace(isSupportedDevice=int(self.has_gpm)))

    def nvmlGpmSampleAlloc(self) -> Any:
        return pynvml.c_nvmlGpmSample_t()

    def nvmlGpmSampleGet(self, device: str, sample: Any) -> None:
        self.samples.append(device)

    def nvmlGpmMigSampleGet(self, device: str, instance: int, sample: Any) -> None:
        self.samples.append(f"{device}/{instance}")

    def nvmlGpmMetricsGet(self, request: Any) -> None:
        assert request.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        told = {
            pynvml.NVML_GPM_METRIC_SM_UTIL: 80.0,
            pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: 24.0,
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 71.0,
        }
        for slot in range(request.numMetrics):
            metric = request.metrics[slot]
            if metric.metricId in told:
                metric.value, metric.nvmlReturn = told[metric.metricId], pynvml.NVML_SUCCESS
            else:
                metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED


def test_a_device_tells_everything_in_base_units() -> None:
    assert Gpu(Driver(), "device").read() == GpuReading(
        utilization_ratio=0.99,
        memory_used_bytes=3 * 2**30,
        memory_total_bytes=80 * 2**30,
        power_watts=345.6,
        temperature_celsius=61.0,
        sm_clock_hertz=1.98e9,
        sm_active_ratio=0.8,
        sm_occupancy_ratio=0.24,
        tensor_active_ratio=None,  # this driver answers NOT_SUPPORTED for it alone
        dram_active_ratio=0.71,
    )


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        ("memory", {"memory_used_bytes", "memory_total_bytes"}),
        ("power", {"power_watts"}),
        ("rates", {"utilization_ratio"}),
        ("temperature", {"temperature_celsius"}),
        ("clock", {"sm_clock_hertz"}),
        ("gpm", {"sm_active_ratio", "sm_occupancy_ratio", "dram_active_ratio"}),
    ],
)
def test_what_a_device_does_not_tell_is_none_and_the_rest_is_there(
    missing: str, absent: set[str]
) -> None:
    reading = Gpu(Driver(missing=(missing,)), "device").read()
    found = {name for name in GPU_FIELDS if getattr(reading, name) is None}
    assert found == absent | {"tensor_active_ratio"}


def test_before_hopper_there_is_no_occupancy() -> None:
    reading = Gpu(Driver(has_gpm=False), "device").read()
    assert reading.sm_occupancy_ratio is None
    assert reading.utilization_ratio == 0.99


def test_a_part_of_a_device_is_sampled_through_its_parent() -> None:
    driver = Driver(mig=True)
    assert Gpu(driver, "device").read().sm_occupancy_ratio == 0.24
    assert driver.samples == ["parent/7", "parent/7"]


def test_torchs_uuid_becomes_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert open_gpu("ab-cd") is not None
    assert driver.uuid == "GPU-ab-cd"
    assert open_gpu("MIG-1") is not None
    assert driver.uuid == "MIG-1"


def test_without_a_device_there_is_nothing_to_read() -> None:
    assert open_gpu(None) is None


def test_without_a_driver_there_is_nothing_to_read() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert open_gpu("GPU-00000000-0000-0000-0000-000000000000") is None
    else:
        pytest.skip("this machine has NVIDIA's driver")
