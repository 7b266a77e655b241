"""What a step costs: time on its devices, processor time, and energy where the device tells."""

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
    """Of one step.

    Attributes:
        device: what it computed on, by name.
        devices: so many of them; a machine's processors count as one.
        seconds: from its start to its end.
        cpu_seconds: of processor time, of this process and those that it waited for.
        energy_joules: that its GPUs took meanwhile; None where not all of them tell.
    """

    device: str
    devices: int
    seconds: float
    cpu_seconds: float
    energy_joules: float | None = None

    @property
    def device_seconds(self) -> float:
        """Seconds times devices: what is paid for."""
        return self.seconds * self.devices

    @property
    def metrics(self) -> dict[str, float]:
        """As MLflow has them."""
        told = {"device_seconds": self.device_seconds}
        return told if self.energy_joules is None else told | {"energy_joules": self.energy_joules}


@dataclass(frozen=True)
class Spent:
    """What something cost, for people.

    Attributes:
        what: a step, or so many runs.
        device: its name.
        seconds: device-seconds.
        joules: energy, as far as devices told; None where none did.
        partly: whether some of the time's energy was not told.
        at_least: whether there were steps, perhaps on this device, that did not live to tell what they cost.
    """

    what: str
    device: str
    seconds: float
    joules: float | None = None
    partly: bool = False
    at_least: bool = False

    @property
    def time(self) -> str:
        """In hours, or seconds where it was less than one."""
        told = f"{self.seconds / 3600:,.1f} h" if self.seconds >= 3600 else f"{self.seconds:,.0f} s"
        return "at least " * self.at_least + told

    @property
    def energy(self) -> str:
        """In kilowatt-hours, or watt-hours."""
        if self.joules is None:
            return "not told"
        hours = self.joules / 3600
        told = f"{hours / 1000:,.2f} kWh" if hours >= 1000 else f"{hours:,.1f} Wh"
        return "at least " * (self.partly or self.at_least) + told


def total(entries: Iterable[Spent], what: str) -> list[Spent]:
    """The sums, by device."""
    by_device: dict[str, list[Spent]] = {}
    for entry in entries:
        by_device.setdefault(entry.device, []).append(entry)
    return [_sum(own, what) for own in by_device.values()]


def _sum(entries: Sequence[Spent], what: str) -> Spent:
    told = [entry.joules for entry in entries if entry.joules is not None]
    return Spent(
        what,
        entries[0].device,
        seconds=sum(entry.seconds for entry in entries),
        joules=sum(told) if told else None,
        partly=bool(told) and (len(told) < len(entries) or any(entry.partly for entry in entries)),
        at_least=any(entry.at_least for entry in entries),
    )


class Meter:
    """Runs from when it is made. What cannot be measured is left out: metering never ends a step.

    Args:
        devices: GPUs of the step, those of other nodes included; the number does not count where there are none.
        here: of them, on this machine.
    """

    def __init__(self, devices: int = 1, here: int = 1) -> None:
        self._devices, self._here = devices, here
        self._started, self._cpu, self._energy = time.monotonic(), _cpu_seconds(), _gpu_joules()

    def read(self) -> Cost:
        """What it has cost so far."""
        used = _gpus_used(self._here)
        return Cost(
            device=next(iter(used.values())) if used else processor_name(),
            devices=self._devices if used else 1,
            seconds=round(time.monotonic() - self._started, 3),
            cpu_seconds=round(_cpu_seconds() - self._cpu, 3),
            energy_joules=self._joules(list(used)),
        )

    def _joules(self, used: Sequence[str]) -> float | None:
        """What the GPUs that are used took; None unless all of them, on all nodes, tell."""
        now = _gpu_joules() if used else {}
        if not used or self._devices > self._here or not all(gpu in now and gpu in self._energy for gpu in used):
            return None
        return round(sum(now[gpu] - self._energy[gpu] for gpu in used), 3)


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _gpus_used(processes: int) -> dict[str, str]:
    """The names of the GPUs that were computed on, by NVML's id; PyTorch is not loaded for it."""
    torch = sys.modules.get("torch")
    # Where several processes share the work, it is they who compute, one on each GPU.
    if torch is None or not (torch.cuda.is_initialized() or (processes > 1 and torch.cuda.is_available())):
        return {}
    try:
        own = range(processes) if processes > 1 else [torch.cuda.current_device()]
        properties = [torch.cuda.get_device_properties(index) for index in own]
        return {f"GPU-{entry.uuid}": str(entry.name) for entry in properties}
    except (RuntimeError, AssertionError, AttributeError):  # a GPU that is lost, an old PyTorch
        return {}


def _gpu_joules() -> dict[str, float]:
    """What each GPU of this machine has used since its driver was loaded, where it tells (NVML)."""
    joules: dict[str, float] = {}
    with _nvml() as nvml:
        if nvml is None:
            return joules
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # before Volta, in a MIG slice, or lost
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                joules[nvml.nvmlDeviceGetUUID(handle)] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return joules


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVIDIA's library, opened; None where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or one of another version
        yield None
        return
    with contextlib.suppress(pynvml.NVMLError):  # the driver went away: no figures, but no end of the step either
        yield pynvml
        pynvml.nvmlShutdown()
