"""What a step costs: time on its devices, processor time, and energy where the device tells."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from scop.processor import processor_name


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        device: what it computed on, by name.
        devices: so many of them; a machine's processors count as one.
        seconds: from its start to its end.
        cpu_seconds: of processor time, of this process and those that it waited for.
        energy_joules: that the GPUs of this machine took meanwhile, whoever used them; None where none tells.
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
        joules: energy, as far as devices told.
    """

    what: str
    device: str
    seconds: float
    joules: float | None

    @property
    def time(self) -> str:
        """In hours, or seconds where it was less than one."""
        return f"{self.seconds / 3600:,.1f} h" if self.seconds >= 3600 else f"{self.seconds:,.0f} s"

    @property
    def energy(self) -> str:
        """In kilowatt-hours, or watt-hours."""
        if self.joules is None:
            return "not told"
        hours = self.joules / 3600
        return f"{hours / 1000:,.2f} kWh" if hours >= 1000 else f"{hours:,.1f} Wh"


class Meter:
    """Runs from when it is made.

    Args:
        devices: GPUs of the step, those of other nodes included; the number does not count where there are none.
    """

    def __init__(self, devices: int = 1) -> None:
        self._devices = devices
        self._started, self._cpu, self._energy = time.monotonic(), _cpu_seconds(), _gpu_joules()

    def read(self) -> Cost:
        """What it has cost so far."""
        energy = _gpu_joules()
        # A GPU that was first used within is counted from then on.
        spent = [now - self._energy.get(name, now) for name, now in energy.items()]
        name, on_gpus = _device(self._devices > 1)
        return Cost(
            device=name,
            devices=self._devices if on_gpus else 1,
            seconds=round(time.monotonic() - self._started, 3),
            cpu_seconds=round(_cpu_seconds() - self._cpu, 3),
            energy_joules=round(sum(spent), 3) if spent else None,
        )


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _device(several: bool) -> tuple[str, bool]:
    """The name of what was computed on, and whether that is a GPU; PyTorch is not loaded for it."""
    torch = sys.modules.get("torch")
    # Where several processes share the work, it is they who compute.
    if torch is None or not (torch.cuda.is_initialized() or (several and torch.cuda.is_available())):
        return processor_name(), False
    return torch.cuda.get_device_name(), True


def _gpu_joules() -> dict[str, float]:
    """What each GPU that this process may see has used since its driver was loaded, where it tells (NVML)."""
    with _nvml() as nvml:
        if nvml is None:
            return {}
        joules = {}
        for handle in _visible(nvml):
            with contextlib.suppress(nvml.NVMLError):  # before Volta, or in a MIG slice
                joules[nvml.nvmlDeviceGetUUID(handle)] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        return joules


def _visible(nvml: Any) -> Iterator[Any]:
    """Those of CUDA_VISIBLE_DEVICES, which names them by number, or by the beginning of their UUID."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        yield from handles
        return
    for entry in filter(None, (part.strip() for part in chosen.split(","))):
        if entry.isdecimal():
            yield from handles[int(entry) : int(entry) + 1]
        else:
            yield from (handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(entry))


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVIDIA's library, opened; None where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or one of another version
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
