"""Cost of steps, with a fake GPU energy counter."""

import sys
from types import SimpleNamespace

import pytest

from scop.system.cost import Cost, Meter, Spent, total


def test_meter_measures_time_and_names_the_device() -> None:
    meter = Meter()
    total = sum(number * number for number in range(300_000))
    cost = meter.read()
    assert total > 0
    assert cost.seconds > 0
    assert cost.cpu_seconds > 0
    assert cost.devices == 1
    assert cost.device
    assert cost.device_seconds == cost.seconds


def test_totals_mark_incomplete_costs() -> None:
    runs = [Spent("a run", "a GPU", 3600.0, 36e5), Spent("a run", "a GPU", 60.0, 36e5, at_least=True)]
    (both,) = total(runs, "2 runs")
    assert (both.time, both.energy) == ("at least 1.0 h", "at least 2.00 kWh")


def test_device_seconds_scale_with_the_number_of_devices() -> None:
    cost = Cost("a GPU", 4, 10.0, 3.0, 5000.0)
    assert cost.metrics == {"device_seconds": 40, "energy_joules": 5000}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two fake GPUs that use 60 and 3 joules; `current` is the one in use, and `lost` fails to report."""
    machine = SimpleNamespace(current=0, lost=None, used=True, millijoules={0: [1_000, 61_000], 1: [5_000, 8_000]})

    def consumed(handle: int) -> int:
        if handle == machine.lost:
            raise RuntimeError("GPU is lost")
        return machine.millijoules[handle].pop(0)

    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}abc",
        nvmlDeviceGetTotalEnergyConsumption=consumed,
    )
    cuda = SimpleNamespace(
        is_initialized=lambda: machine.used,
        is_available=lambda: True,
        current_device=lambda: machine.current,
        get_device_properties=lambda index: SimpleNamespace(name="a GPU", uuid=f"{index}abc"),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return machine


@pytest.mark.parametrize(("current", "joules"), [(0, 60), (1, 3)])
def test_measures_the_energy_of_the_gpu_in_use(gpus: SimpleNamespace, current: int, joules: int) -> None:
    gpus.current = current
    cost = Meter().read()
    assert (cost.device, cost.devices, cost.energy_joules) == ("a GPU", 1, joules)


def test_sums_energy_over_one_gpu_per_process(gpus: SimpleNamespace) -> None:
    cost = Meter(devices=2, here=2).read()
    assert (cost.devices, cost.energy_joules) == (2, 63)


def test_reports_no_energy_unless_all_gpus_report_it(gpus: SimpleNamespace) -> None:
    assert Meter(devices=4, here=2).read().energy_joules is None  # GPUs of other nodes are not visible
    gpus.lost = 1
    gpus.millijoules[0] = [1_000, 61_000]
    cost = Meter(devices=2, here=2).read()
    assert (cost.device, cost.devices, cost.energy_joules) == ("a GPU", 2, None)


def test_does_not_charge_an_unused_gpu(gpus: SimpleNamespace) -> None:
    gpus.used = False
    cost = Meter().read()
    assert cost.device != "a GPU"
    assert cost.energy_joules is None


def test_totals_are_per_device_and_mark_missing_energy() -> None:
    known = Spent("finetune", "a GPU", 3600, 720_000)
    cpu, gpu = total([Spent("export", "a CPU", 10), known, Spent("evaluate", "a GPU", 60)], "1 run")
    assert (cpu.what, cpu.device, cpu.time, cpu.energy) == ("1 run", "a CPU", "10 s", "n/a")
    assert (gpu.device, gpu.time, gpu.energy) == ("a GPU", "1.0 h", "at least 200.0 Wh")
    assert total([known, known], "2 steps")[0].energy == "400.0 Wh"
