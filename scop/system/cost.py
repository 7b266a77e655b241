"""Cost of a step: time on its devices, processor time, and energy if the devices report it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from scop.system.processor import processor_name


@dataclass(frozen=True)
class Cost:
    """Cost of one step.

    Attributes:
        device: name of the device that it ran on.
        devices: number of devices; all processors of a machine count as one.
        seconds: duration.
        cpu_seconds: processor time of this process and of the child processes that it waited for.
        energy_joules: energy that its GPUs used; None unless all of them report it.
    """

    device: str
    devices: int
    seconds: float
    cpu_seconds: float
    energy_joules: float | None = None

    @property
    def device_seconds(self) -> float:
        """Duration times number of devices, the time that is billed."""
        return self.seconds * self.devices

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics for MLflow."""
        metrics = {"device_seconds": self.device_seconds}
        return metrics if self.energy_joules is None else metrics | {"energy_joules": self.energy_joules}


@dataclass(frozen=True)
class Spent:
    """Cost of one or more steps on a device, for display.

    Attributes:
        what: a step, or a number of runs.
        device: name of the device.
        seconds: device-seconds.
        joules: reported energy; None if none was reported.
        partly: whether energy is missing for part of the time.
        at_least: whether steps, perhaps on this device, ended without a report of their cost.
    """

    what: str
    device: str
    seconds: float
    joules: float | None = None
    partly: bool = False
    at_least: bool = False

    @property
    def time(self) -> str:
        """Device time as text, in hours, or in seconds below one hour."""
        text = f"{self.seconds / 3600:,.1f} h" if self.seconds >= 3600 else f"{self.seconds:,.0f} s"
        return "at least " * self.at_least + text

    @property
    def energy(self) -> str:
        """Energy as text, in kWh, or in Wh below one kWh."""
        if self.joules is None:
            return "n/a"
        hours = self.joules / 3600
        text = f"{hours / 1000:,.2f} kWh" if hours >= 1000 else f"{hours:,.1f} Wh"
        return "at least " * (self.partly or self.at_least) + text


def total(entries: Iterable[Spent], what: str) -> list[Spent]:
    """Return the sum of all costs on each device."""
    by_device: dict[str, list[Spent]] = {}
    for entry in entries:
        by_device.setdefault(entry.device, []).append(entry)
    return [_sum(own, what) for own in by_device.values()]


def _sum(entries: Sequence[Spent], what: str) -> Spent:
    known = [entry.joules for entry in entries if entry.joules is not None]
    return Spent(
        what,
        entries[0].device,
        seconds=sum(entry.seconds for entry in entries),
        joules=sum(known) if known else None,
        partly=bool(known) and (len(known) < len(entries) or any(entry.partly for entry in entries)),
        at_least=any(entry.at_least for entry in entries),
    )


class Meter:
    """Measures cost from its creation on. A failed measurement is left out and never fails the step.

    Args:
        devices: number of GPUs of the step, on all nodes; ignored if the step uses no GPU.
        here: number of these GPUs that are on this machine.
    """

    def __init__(self, devices: int = 1, here: int = 1) -> None:
        self._devices, self._here = devices, here
        self._started, self._cpu, self._energy = time.monotonic(), _cpu_seconds(), _gpu_joules()

    def read(self) -> Cost:
        """Return the cost so far."""
        used = _gpus_used(self._here)
        return Cost(
            device=next(iter(used.values())) if used else processor_name(),
            devices=self._devices if used else 1,
            seconds=round(time.monotonic() - self._started, 3),
            cpu_seconds=round(_cpu_seconds() - self._cpu, 3),
            energy_joules=self._joules(list(used)),
        )

    def _joules(self, used: Sequence[str]) -> float | None:
        """Return the energy of the GPUs in use, in joules; None unless all of them, on all nodes, report it."""
        now = _gpu_joules() if used else {}
        if not used or self._devices > self._here or not all(gpu in now and gpu in self._energy for gpu in used):
            return None
        return round(sum(now[gpu] - self._energy[gpu] for gpu in used), 3)


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _gpus_used(processes: int) -> dict[str, str]:
    """Return NVML's ID -> name of the GPUs in use; does not import PyTorch."""
    torch = sys.modules.get("torch")
    # With several processes, each computes on one GPU, and CUDA may not be initialised in this one.
    if torch is None or not (torch.cuda.is_initialized() or (processes > 1 and torch.cuda.is_available())):
        return {}
    try:
        own = range(processes) if processes > 1 else [torch.cuda.current_device()]
        properties = [torch.cuda.get_device_properties(index) for index in own]
        return {f"GPU-{entry.uuid}": str(entry.name) for entry in properties}
    except (RuntimeError, AssertionError, AttributeError):  # a lost GPU, or an old PyTorch
        return {}


def _gpu_joules() -> dict[str, float]:
    """Return NVML's ID -> energy in joules since the driver was loaded, for each GPU here that reports it."""
    joules: dict[str, float] = {}
    with _nvml() as nvml:
        if nvml is None:
            return joules
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # older than Volta, a MIG slice, or lost
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                joules[nvml.nvmlDeviceGetUUID(handle)] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return joules


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Initialise NVML and yield it; yield None without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or an incompatible version
        yield None
        return
    with contextlib.suppress(pynvml.NVMLError):  # the driver was unloaded: no figures, but the step continues
        yield pynvml
        pynvml.nvmlShutdown()
