"""One network's part of a benchmark: trained, pruned in several ways and fine-tuned, with all results on disk.

Requires only torch, torchvision, numpy, safetensors, pydantic and torch-pruning.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from scop import make_model, prune, select_channels, train_knockoffs
from scop.compute.device import autocast_dtype, pick_device
from scop.config import DenseSection, FinetuneSection, KnockoffSection, TrainingSection, VariantSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset
from scop.errors import Stopped
from scop.models.artifacts import load_weights, save_model
from scop.models.evaluation import count_macs, count_parameters, measure_accuracy, measure_latency
from scop.pruning.plan import ChannelPlan
from scop.report.correctness import packed
from scop.selection.scores import Scores
from scop.storage.checkpoints import Checkpoints
from scop.training.checkpointing import Checkpointing
from scop.training.learning_rate import Schedule
from scop.training.loop import Step, fit
from scop.training.supervised import Supervised, make_optimizer, recalibrate
from tests.benchmarks.graphs import Replayed
from tests.benchmarks.measure import machine, settings_hash

LATENCY_BATCH = 64
SELECTION = 2
"""Version of the global selection. Increase it if the same settings select other channels, to discard old figures."""
HOW = {"compile"}
"""Training settings that affect the speed, not the result."""


@dataclass(frozen=True)
class Plan:
    """Settings of all measurements of one network.

    Attributes:
        dense: training of the dense network, or its weights.
        finetune: training after pruning.
        variants: ways of pruning; one is named none.
        seeds: seeds of scores, of random choices and of fine-tuning.
        once: variants that are measured with the first seed only.
        command: command that makes the figures.
    """

    dense: DenseSection
    finetune: FinetuneSection
    variants: dict[str, VariantSection]
    seeds: tuple[int, ...] = (0, 1, 2)
    once: tuple[str, ...] = ()
    command: str = "make bench-gpu"


class Work:
    """One network's work, which is stored in a folder and can be resumed.

    Args:
        name: name of the network.
        plan: settings of all measurements.
        dataset: the images.
        folder: parent of the folder for intermediate files.
        stopping: returns whether the time is up; must be picklable if other processes do the work.
        earlier: figures of an earlier report, by variant and seed. Used only if the plan names the dense network's
            weights: a network trained for the benchmark exists only in its folder.
        alone: whether no other work runs at the same time; only then is the speedup measured.
        graphs: replay steps as CUDA graphs, on a GPU.

    Attributes:
        fingerprint: hash of the dense network and the images.

    Raises:
        Stopped: by its methods, when the time is up; an interrupted training writes a checkpoint first.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        dataset: Dataset,
        folder: Path,
        stopping: Callable[[], bool],
        earlier: Mapping[str, dict[str, Any]] | None = None,
        alone: bool = True,
        graphs: bool = False,
    ) -> None:
        self.name, self.plan, self.dataset, self.stopping, self.alone = name, plan, dataset, stopping, alone
        self.device = pick_device()
        self._step = Replayed if graphs and self.device.type == "cuda" else Step
        given = plan.dense.weights and sha256(Path(plan.dense.weights).read_bytes()).hexdigest()
        dense = [plan.dense.model_dump(exclude={"weights", *HOW}), given]
        self.fingerprint = settings_hash(*dense, dataset.info.content, len(dataset["train"]))
        self._earlier = earlier if earlier and given else {}
        self.folder = folder / f"{name}-{self.fingerprint}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def left(self, seed: int, only: Container[str] | None = None) -> list[str]:
        """Return the variants, or those of `only`, that still need figures for this seed."""
        return [
            variant
            for variant in self.plan.variants
            if (variant not in self.plan.once or seed == self.plan.seeds[0])
            and (only is None or variant in only)
            and not self.known(variant, seed)
        ]

    def prepare(self) -> None:
        """Make the dense network, which all variants need."""
        self._check_time("the dense network")
        self.dense()

    def run(self, variant: str, seed: int) -> None:
        """Make and store a variant's figures."""
        self._check_time(f"{variant}-{seed}")
        path = self._file(variant, seed, "json")
        text = json.dumps(self.finetuned(variant, seed), indent=1)
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").rename(path)

    def _check_time(self, what: str) -> None:
        if self.stopping():
            raise Stopped(f"{self.name}: no time is left to start {what}")

    def known(self, variant: str, seed: int) -> dict[str, Any] | None:
        """Return a variant's figures for these settings, or None if there are none."""
        path = self._file(variant, seed, "json")
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        row = self._earlier.get(f"{variant}-{seed}")
        return row if row and row["settings_hash"] == self.settings(variant) else None

    def settings(self, variant: str) -> str:
        """Hash all settings that a variant's figures depend on, except the seed."""
        section = self.plan.variants[variant]
        made = [section.model_dump(), *([SELECTION] if section.selection == "global" else [])]
        if section.method == "scop":
            made.append(self.knockoff.model_dump())
        finetune = self.plan.finetune.model_dump(exclude=HOW)
        distillation = finetune["distillation"]
        if not distillation["attention"] or distillation["attention_until"] == 1:
            del distillation["attention_until"]  # added later; earlier figures stay valid
        if not distillation["mirror"]:
            del distillation["mirror"]  # also added later
        return settings_hash(self.fingerprint, finetune, *made)

    @property
    def knockoff(self) -> KnockoffSection:
        """Settings of the knockoff phase, which makes the scores."""
        fine = self.plan.finetune
        return KnockoffSection(crop_padding=fine.crop_padding, flip=fine.flip)

    def _file(self, variant: str, seed: int, kind: str) -> Path:
        return self.folder / f"{variant}-{seed}-{self.settings(variant)}.{kind}"

    def dense(self) -> nn.Module:
        """Return the dense network, loaded or trained."""
        path, given = self.folder / "dense.safetensors", self.plan.dense.weights
        torch.manual_seed(self.plan.dense.seed)
        model = self.fresh()
        if path.exists():
            load_weights(model, path)
            return model.eval()
        if given is not None:
            load_weights(model, given)
        seconds = 0.0 if given is not None else self.train(model, self.plan.dense, "dense", None, self.fingerprint)
        model.to(self.device)
        figures = self.figures(model) | {"seconds": seconds}
        (self.folder / "dense.json").write_text(json.dumps(figures, indent=1))
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        return model.cpu().eval()

    def fresh(self) -> nn.Module:
        """Return the network with random weights."""
        return make_model(
            self.plan.dense.model, num_classes=len(self.dataset.info.classes), **self.plan.dense.arguments
        )

    def scores(self, model: nn.Module, seed: int) -> Scores:
        """Return the scores of the dense network's channels, computed once per seed."""
        section = self.knockoff.model_copy(update={"seed": seed})
        path = self.folder / f"scores-{settings_hash(section.model_dump())}.safetensors"
        if not path.exists():
            batches = self.batches(section.batch_size, section)
            part = path.with_suffix(f".{os.getpid()}")  # other processes may compute the same scores
            train_knockoffs(model, batches, section, device=self.device).save(part)
            part.rename(path)
        return Scores.load(path)

    def selected(self, name: str, dense: nn.Module, seed: int) -> ChannelPlan:
        """Return a variant's plan for this seed. It is stored, since repeated latency measurements differ."""
        path = self._file(name, seed, "plan")
        if not path.exists():
            variant = self.plan.variants[name].model_copy(update={"seed": seed})
            scores = self.scores(dense, seed) if variant.method == "scop" else None
            shape = self.dataset.info.shape
            select_channels(dense, scores, input_shape=shape, variant=variant, device=self.device).save(path)
        return ChannelPlan.load(path)

    def finetuned(self, name: str, seed: int) -> dict[str, Any]:
        """Return the figures of a variant; its network is stored next to them."""
        section, dense = self.plan.finetune.model_copy(update={"seed": seed}), self.dense()
        pruned = prune(dense, self.selected(name, dense, seed))
        for network in (pruned, dense):
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher = dense.requires_grad_(False)
        dtype = autocast_dtype(self.device, section.precision)
        if name != "none":
            recalibrate(pruned, self.batches(section.batch_size, section), 50, self.device, dtype)
        recalibrated = measure_accuracy(pruned.eval(), self.test(), self.device).top1
        seconds = self.train(pruned, section, f"{name}-{seed}", teacher, self.settings(name))
        save_model(pruned, self._file(name, seed, "model"))
        return self.figures(pruned) | {
            "recalibrated_top1": recalibrated,
            "seconds": seconds,
            "speedup": self.speedup(dense, pruned) if self.alone else None,
            "compile": section.compile,
            "settings_hash": self.settings(name),
            "machine": machine(),
        }

    def speedup(self, dense: nn.Module, pruned: nn.Module) -> float:
        """Return the speedup of a forward pass, measured alternately with the dense network."""
        networks = {"dense": dense.eval(), "pruned": pruned.eval()}
        times = measure_latency(networks, self.dataset.info.shape, LATENCY_BATCH, self.device)
        return times["dense"].p50 / times["pruned"].p50

    def train(
        self, model: nn.Module, section: TrainingSection, label: str, teacher: nn.Module | None, settings: str
    ) -> float:
        """Train in place from the newest checkpoint; return the total seconds."""
        torch.manual_seed(section.seed)
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distillation = section.distillation if isinstance(section, FinetuneSection) else None
        objective = Supervised(model, self.device, section, teacher, distillation)
        checkpoints = Checkpoints(str(self.folder / f"checkpoints-{label}-{settings}"), settings, keep=1)
        history = fit(
            objective,
            self.batches(section.batch_size, section),
            make_optimizer(model, section),
            replace(Schedule.of(section), keep="last"),
            label=f"{self.name} {label}",
            seed=section.seed,
            checkpointing=Checkpointing(Seldom(checkpoints), self.stopping),
            step=self._step,
        )
        objective.finish()
        checkpoints.remove()
        return round(sum(record.seconds for record in history), 1)

    def batches(self, size: int, section: TrainingSection | KnockoffSection) -> Batches:
        augmentation = Augmentation(crop_padding=section.crop_padding, flip=section.flip)
        return Batches(self.dataset["train"], self.dataset.info, size, self.device, augmentation, section.seed)

    def test(self) -> Batches:
        return Batches(self.dataset["test"], self.dataset.info, 500, self.device)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Return accuracy on the test split, in total and per image (`scop.report.correctness`), and sizes."""
        accuracy = measure_accuracy(model.eval(), self.test(), self.device)
        return {
            "top1": accuracy.top1,
            "right": packed(accuracy.right.numpy()),
            "params": count_parameters(model),
            "macs": count_macs(model, self.dataset.info.shape),
        }

    def report(self) -> dict[str, Any]:
        """Return all figures so far; the dense network must exist."""
        every = ((variant, seed) for seed in self.plan.seeds for variant in self.plan.variants)
        return {
            "network": self.name,
            "dense": json.loads((self.folder / "dense.json").read_text()),
            "variants": {f"{variant}-{seed}": row for variant, seed in every if (row := self.known(variant, seed))},
            "settings": {
                "variants": {
                    name: v.model_dump(mode="json", exclude_unset=True) for name, v in self.plan.variants.items()
                },
                "dense": self.plan.dense.model_dump(mode="json", exclude={"weights"}),
                "finetune": self.plan.finetune.model_dump(mode="json"),
            },
            "data": self.dataset.info.source,
            "training_images": len(self.dataset["train"]),
            "command": self.plan.command,
        }


@dataclass
class Seldom:
    """Checkpoints for short epochs: written when training stops, and otherwise at most twice a minute."""

    checkpoints: Checkpoints
    written: float = -math.inf

    @property
    def uri(self) -> str:
        return self.checkpoints.uri

    def part(self, name: str) -> Seldom:
        return Seldom(self.checkpoints.part(name))

    def load(self) -> dict[str, Any] | None:
        return self.checkpoints.load()

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None:
        if steps or time.monotonic() - self.written > 30:
            self.checkpoints.save(state, epochs, steps)
            self.written = time.monotonic()
