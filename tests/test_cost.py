"""What steps cost; a GPU's meter is stood in for, since there is none here."""

import sys
from types import SimpleNamespace

import pytest

from scop.cost import Cost, Meter


def test_a_meter_tells_time_and_the_machine() -> None:
    meter = Meter()
    total = sum(number * number for number in range(300_000))
    cost = meter.read()
    assert total > 0
    assert cost.seconds > 0
    assert cost.cpu_seconds > 0
    assert cost.devices == 1
    assert cost.device
    assert cost.device_seconds == cost.seconds


def test_several_devices_cost_their_sum() -> None:
    cost = Cost("a GPU", 4, 10.0, 3.0, 5000.0)
    assert cost.metrics == {"device_seconds": 40, "energy_joules": 5000}


def test_energy_is_that_of_the_gpus_that_the_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = {0: [1_000, 61_000], 1: [5_000, 8_000]}
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}abc",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle].pop(0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert Meter().read().energy_joules == 60
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert Meter().read().energy_joules == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Meter().read().energy_joules is None
