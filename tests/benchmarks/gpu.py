"""`make bench-gpu`: ResNet-56 and ResNet-50 trained, pruned and fine-tuned from the shared archive.

It works for some minutes, stops by itself, and goes on where it stopped when it is called again; exit code 3 says that
work is left. It needs torch, torchvision, numpy, safetensors, pydantic and torch-pruning, and writes
gpu-NETWORK.json after each network that is ready.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from scop import make_model, prune, select_channels, train_knockoffs
from scop.artifacts import load_weights
from scop.batches import Augmentation, Batches
from scop.checkpoints import Checkpoints
from scop.config import DataSection, DenseSection, FinetuneSection, KnockoffSection, TrainingSection, VariantSection
from scop.data import Dataset, load_dataset, save_dataset
from scop.device import autocast_dtype, describe_device, pick_device
from scop.errors import Stopped
from scop.evaluation import count_macs, count_parameters, measure_accuracy
from scop.knockoff import Scores
from scop.sources import load_source
from scop.supervised import Supervised, make_optimizer, recalibrate
from scop.training import fit

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "benchmarks" / "gpu"
RESULTS = Path(__file__).parent / "results"
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
WORK_LEFT = 3


@dataclass(frozen=True)
class Plan:
    """What is done with one network.

    Attributes:
        dense, finetune: how it is trained, first and after pruning.
        budget: of the pruned network.
        seeds: of fine-tuning, for the pruned network and for the one from which nothing is removed.
    """

    dense: DenseSection
    finetune: FinetuneSection
    budget: dict[str, float]
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def variants(self) -> dict[str, VariantSection]:
        return {
            "none": VariantSection(method="none"),
            "scop": VariantSection.model_validate({"selection": "global", "budget": self.budget}),
            "l1": VariantSection.model_validate({"method": "l1", "selection": "global", "budget": self.budget}),
        }


_AUGMENTED: dict[str, Any] = {"crop_padding": 4, "flip": True, "schedule": "one_cycle", "label_smoothing": 0.1}
_FINE: dict[str, Any] = _AUGMENTED | {"ema": 0.998, "distillation": {"weight": 0.5}, "label_smoothing": 0.0}


def plans(compiled: bool) -> dict[str, Plan]:
    """By name; sized for 25 minutes on one data-centre GPU with one seed."""
    more = {"compile": compiled}
    small = {"batch_size": 256, **more}
    return {
        "resnet56": Plan(
            DenseSection.model_validate(
                {"model": "resnet56", "epochs": 60, "lr": 0.4, "warmup_epochs": 12, **_AUGMENTED, **small}
            ),
            FinetuneSection.model_validate({"epochs": 30, "lr": 0.1, "warmup_epochs": 3, **_FINE, **small}),
            {"macs": 0.44},
        ),
        "resnet50": Plan(
            DenseSection.model_validate(
                {"model": "torchvision:resnet50", "epochs": 40, "lr": 0.2, "warmup_epochs": 8, **_AUGMENTED, **small}
            ),
            FinetuneSection.model_validate({"epochs": 20, "lr": 0.05, "warmup_epochs": 2, **_FINE, **small}),
            {"params": 10_587_835},
        ),
    }


class Work:
    """One network's work, kept in a folder so that it can be gone on with.

    Args:
        name: of the network.
        plan: what is done with it.
        dataset: the images.
        folder: where it is kept.
        stopping: says when time is up.

    Raises:
        Stopped: by its methods, when time is up; a checkpoint is written.
    """

    def __init__(self, name: str, plan: Plan, dataset: Dataset, folder: Path, stopping: Callable[[], bool]) -> None:
        self.name, self.plan, self.dataset, self.stopping = name, plan, dataset, stopping
        self.device = pick_device()
        settings = [plan.dense.model_dump(), plan.finetune.model_dump(), plan.budget, dataset.info.content]
        self.fingerprint = sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.folder = folder / f"{name}-{self.fingerprint}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, seed: int) -> None:
        """All variants by one seed."""
        for variant in self.plan.variants:
            if variant == "l1" and seed != self.plan.seeds[0]:
                continue
            self.once(f"{variant}-{seed}.json", partial(self.finetuned, variant, seed))

    def once(self, file: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, made only if it is not there."""
        path = self.folder / file
        if not path.exists():
            made = json.dumps(make(), indent=1)
            path.with_suffix(".part").write_text(made)
            path.with_suffix(".part").rename(path)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def dense(self) -> nn.Module:
        """The trained network."""
        path = self.folder / "dense.safetensors"
        model = self.fresh()
        if path.exists():
            load_weights(model, path)
            return model.eval()
        torch.manual_seed(self.plan.dense.seed)
        model = self.fresh()
        started = self.train(model, self.plan.dense, "dense", None)
        figures = self.figures(model) | {"seconds": started}
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        (self.folder / "dense.json").write_text(json.dumps(figures, indent=1))
        return model.eval()

    def fresh(self) -> nn.Module:
        """The network with random weights."""
        return make_model(
            self.plan.dense.model, num_classes=len(self.dataset.info.classes), **self.plan.dense.arguments
        )

    def scores(self, model: nn.Module) -> Scores:
        """Of its channels."""
        path = self.folder / "scores.safetensors"
        if not path.exists():
            section = KnockoffSection(crop_padding=self.plan.dense.crop_padding, flip=self.plan.dense.flip)
            batches = self.batches(section.batch_size, section)
            train_knockoffs(model, batches, section, device=self.device).save(path)
        return Scores.load(path)

    def finetuned(self, name: str, seed: int) -> dict[str, Any]:
        """Figures of a variant."""
        variant, section = self.plan.variants[name], self.plan.finetune.model_copy(update={"seed": seed})
        dense = self.dense()
        plan = select_channels(dense, self.scores(dense), variant=variant, device=self.device)
        pruned = prune(dense, plan)
        for network in (pruned, dense):
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher = dense.requires_grad_(False)
        dtype = autocast_dtype(self.device, section.precision)
        if name != "none":
            recalibrate(pruned, self.batches(section.batch_size, section), 50, self.device, dtype)
        recalibrated = measure_accuracy(pruned.eval(), self.test(), self.device).top1
        seconds = self.train(pruned, section, f"{name}-{seed}", teacher)
        return self.figures(pruned) | {"recalibrated_top1": recalibrated, "seconds": seconds}

    def train(self, model: nn.Module, section: TrainingSection, label: str, teacher: nn.Module | None) -> float:
        """Train in place, from the newest checkpoint; the seconds that it took in all."""
        torch.manual_seed(section.seed)
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distillation = section.distillation if isinstance(section, FinetuneSection) else None
        objective = Supervised(model, self.device, section, teacher, distillation)
        checkpoints = Checkpoints(str(self.folder / f"checkpoints-{label}"), self.fingerprint, keep=1)
        history = fit(
            objective,
            self.batches(section.batch_size, section),
            make_optimizer(model, section),
            epochs=section.epochs,
            label=f"{self.name} {label}",
            seed=section.seed,
            schedule=section.schedule,
            warmup_epochs=section.warmup_epochs,
            checkpoints=checkpoints,
            stopping=self.stopping,
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
        """Accuracy on the test split, which nothing was chosen by, and sizes."""
        accuracy = measure_accuracy(model.eval(), self.test(), self.device)
        return {
            "top1": accuracy.top1,
            "params": count_parameters(model),
            "macs": count_macs(model, self.dataset.info.shape),
        }

    def report(self) -> dict[str, Any]:
        """All figures that there are."""
        found = {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}
        return {
            "network": self.name,
            "dense": found.pop("dense"),
            "variants": found,
            "budget": self.plan.budget,
            "settings": {
                "dense": self.plan.dense.model_dump(mode="json"),
                "finetune": self.plan.finetune.model_dump(mode="json"),
            },
            "settings_hash": self.fingerprint,
            "data": self.dataset.info.source,
            "machine": {
                "device": describe_device(self.device),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
            "command": "make bench-gpu",
        }


def images(archive: Path, folder: Path) -> Dataset:
    """The archive's images, packed once."""
    if not (folder / "manifest.json").exists():
        section = DataSection(source="imagefolder", path=str(archive), validation=0)
        save_dataset(load_source(section), folder)
    return load_dataset(folder)


def main(arguments: Sequence[str]) -> int:
    """0 when all is done, 3 while work is left."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__)
    parser.add_argument("networks", nargs="*", help="resnet56, resnet50; both by default")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the images (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between calls (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON goes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="of each network, three at most (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    every = plans(compiled=torch.cuda.is_available() and not options.no_compile)
    unknown = [name for name in options.networks if name not in every]
    if unknown:
        parser.error(f"no network {unknown[0]!r} (known: {', '.join(every)})")
    dataset = images(options.archive, options.work / "cifar10")
    return work_through(
        {name: every[name] for name in options.networks or every},
        dataset,
        options.work,
        options.results,
        options.seeds,
        lambda: time.monotonic() > until,
    )


def work_through(
    chosen: dict[str, Plan], dataset: Dataset, folder: Path, results: Path, seeds: int, stopping: Callable[[], bool]
) -> int:
    """Seed by seed, so that each network has figures as early as possible."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for number in range(seeds):
        for name, plan in chosen.items():
            if number >= len(plan.seeds):
                continue
            work = Work(name, plan, dataset, folder, stopping)
            try:
                work.run(plan.seeds[number])
            except Stopped as stop:
                print(f"{stop}; the same command goes on", flush=True)
                return WORK_LEFT
            report = work.report()
            (results / f"gpu-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
            print(name, {key: figures["top1"] for key, figures in report["variants"].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
