"""`make bench-scores`: how much a score knows, by three measures that need no fine-tuning.

For each way of scoring and each seed:

- top-1 after surgery and recalibration of the batch norms, at three rates, on 5,000 images of the validation split;
- rank correlation with what a channel is worth: by how much the loss grows when it alone is removed;
- over seeds, how far the rankings agree.

And of the published score, how its gates open while they are trained (`saturation`, ResNet-20).

Name some to run only these: ``make bench-scores ARGS="resnet20 fisher l1"``. What is there already is left alone.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import combinations, islice
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop import make_model, prune, select_channels, train_knockoffs
from scop.compute.device import autocast, autocast_dtype, pick_device
from scop.config import DenseSection, KnockoffSection, VariantSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset
from scop.knockoffs.phase import Competition, gated_layers
from scop.knockoffs.sources import make_source
from scop.models.artifacts import load_weights
from scop.models.evaluation import measure_accuracy
from scop.models.folding import folded_copy
from scop.models.history import EpochRecord
from scop.pruning.graph import ChannelGraph
from scop.selection.candidates import find_candidates
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer, recalibrate
from tests.benchmarks import remedies
from tests.benchmarks.accuracy import RESNET56
from tests.benchmarks.measure import machine, settings_hash
from tests.benchmarks.remedies import REMEDIES
from tests.benchmarks.sittings import images
from tests.helpers import SHARED

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parents[2] / "runs" / "benchmarks"
RATES = (0.2, 0.45, 0.6)
SEEDS = (0, 1, 2)
BATCHES = 40
"""Of 256 images, for a score: 10,240 images. A whole epoch changes the figures by less than a seed does."""

Ranking = dict[str, Tensor]

SETTINGS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "fisher, mixing 1": {"mixing": 1.0},
    "fisher, mixing 0.9": {"mixing": 0.9},
    "fisher, mixing 0.7": {"mixing": 0.7},
    "fisher, mixing 0.5": {"mixing": 0.5},
    "fisher, batch norm own": {"batch_norm": "own"},
    "fisher, batch norm joint": {"batch_norm": "joint"},
    "fisher, gaussian": {"source": "gaussian"},
    "fisher, gaussian at distance 0.5": {"source": "gaussian", "gaussian": {"distance": 0.5}},
    "published": {"score": "published", "epochs": 4},
    "published, batch norm own": {"score": "published", "epochs": 4, "batch_norm": "own"},
    "published, batch norm joint": {"score": "published", "epochs": 4, "batch_norm": "joint"},
    "fisher, generator": {"source": "generator", "generator": {"epochs": 10}},
}
"""Sections `knockoff` by name. Four epochs of 40 batches are as many steps as a full one has, nearly."""


GENERATOR = "fisher, generator"
"""By itself and with one seed: its training takes longer than all else."""

CONTROLS = ("l1", "bn_gamma", "fpgm", "random")
TRUTH = "removal of one channel"
SATURATION = "saturation"
PASSES = 8
"""Of `BATCHES` batches each, in which the published score's gates are watched."""
OPEN = 0.95
"""From here on a gate counts as open: its score is the batch norm's weight to a tenth."""
LARGE = ("resnet56",)
"""Networks that only the default, the published score and the controls are judged on, and not by single removals."""


def main(arguments: list[str]) -> int:
    """Networks and ways of scoring by name, all by default."""
    networks = [name for name in NETWORKS if name in arguments] or list(NETWORKS)
    every = [*(way for way in SETTINGS if way != GENERATOR), *REMEDIES, *CONTROLS, TRUTH, GENERATOR]
    named = [way for way in [*every, SATURATION] if way in arguments]
    for network in networks:
        ways = [way for way in named or every if way in every]
        if network in LARGE and not named:
            ways = ["fisher", "published", *CONTROLS]
        path = RESULTS / f"scores-{network}.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"ways": {}}
        bench: Bench | None = None
        for way in ways:
            if results["ways"].get(way, {}).get("settings_hash") == settings_of(network, way):
                continue
            bench = bench or Bench(network)
            results["dense_top1"] = bench.dense_top1
            results["ways"][way] = bench.measure(way) | {"machine": machine()}
            results["ways"] = {known: results["ways"][known] for known in every if known in results["ways"]}
            results["command"] = "make bench-scores"
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(network, way, {k: v for k, v in results["ways"][way].items() if k != "machine"}, flush=True)
        if network == "resnet20" and (SATURATION in named or not named):
            known = results.get(SATURATION, {}).get("settings_hash")
            if known != settings_of(network, SATURATION):
                results[SATURATION] = (bench or Bench(network)).saturation() | {"machine": machine()}
                path.write_text(json.dumps(results, indent=1) + "\n")
                print(network, SATURATION, results[SATURATION]["passes"], flush=True)
    return 0


def section_of(way: str) -> KnockoffSection:
    """The settings of the knockoff phase."""
    return KnockoffSection.model_validate({"crop_padding": 4, "flip": True} | SETTINGS[way])


def settings_of(network: str, way: str) -> str:
    """The hash of all that a way's figures come from."""
    made = section_of(way).model_dump() if way in SETTINGS else remedies.SETTINGS if way in REMEDIES else {}
    if way == SATURATION:
        return settings_hash(network, way, section_of("published").model_dump(), BATCHES, PASSES, OPEN)
    return settings_hash(network, way, made, BATCHES, RATES)


class Bench:
    """One network, and what its scores are judged by."""

    def __init__(self, network: str) -> None:
        self.network, self.device = network, pick_device()
        self.dtype = autocast_dtype(self.device, "auto")
        self.model = NETWORKS[network]().eval()
        self.validation = Batches(dataset()["validation"], dataset().info, 500, self.device)
        # Without changes, but shuffled: images lie by class.
        self.plain = Batches(dataset()["train"], dataset().info, 256, self.device, Augmentation())
        self.shape = tuple(dataset()["train"].images.shape[1:])
        self.dense_top1 = measure_accuracy(
            self.moved(copy.deepcopy(self.model)), self.validation, self.device, self.dtype
        ).top1
        self.truth = None if network in LARGE else self.cached("truth", self._removals)

    def moved(self, network: nn.Module) -> nn.Module:
        """To where it is computed."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def measure(self, way: str) -> dict[str, Any]:
        """All measures of a way of scoring."""
        rankings, seconds = [], []
        # What has no seed is the same for all.
        by_chance = (way in SETTINGS and way != GENERATOR) or way in REMEDIES or way == "random"
        for seed in SEEDS if by_chance else SEEDS[:1]:
            started = time.perf_counter()
            rankings.append(self.ranking(way, seed))
            seconds.append(time.perf_counter() - started)
        top1 = [[self.top1(way, ranking, rate, seed) for rate in RATES] for seed, ranking in enumerate(rankings)]
        pairs = [rank_correlation(a, b) for a, b in combinations(rankings, 2)]
        return {
            "settings": SETTINGS.get(way, {}),
            "settings_hash": settings_of(self.network, way),
            "seeds": len(rankings),
            "seconds": round(mean(seconds), 1),
            "top1": {str(rate): [row[place] for row in top1] for place, rate in enumerate(RATES)},
            "rank_correlation_with_removal": self.truth
            and round(mean(rank_correlation(ranking, self.truth) for ranking in rankings), 3),
            "agreement_of_seeds": round(mean(pairs), 3) if pairs else None,
        }

    def saturation(self) -> dict[str, Any]:
        """Pass by pass, where the published score's gates stand, and how like the batch norms' weights it ranks."""
        section = section_of("published").model_copy(update={"epochs": PASSES})
        augmentation = Augmentation(crop_padding=4, flip=True)
        batches = First(Batches(dataset()["train"], dataset().info, 256, self.device, augmentation, section.seed))
        source = make_source(section, batches, self.device)
        competition = Competition(self.model, ChannelGraph(self.model, self.shape), source, self.device, section)
        gammas, found = self.ranking("bn_gamma", 0), list[dict[str, float]]()

        def watch(record: EpochRecord) -> None:
            competition.after_epoch(record)
            gates = torch.cat([*competition.gates.values().values()])
            score, _, _ = competition.gates.scores()
            found.append(
                {
                    "mean_gate": round(float(gates.mean()), 3),
                    "open": round(float((gates >= OPEN).double().mean()), 3),
                    "closed": round(float((gates <= 1 - OPEN).double().mean()), 3),
                    "correlation_with_gamma": round(rank_correlation(score, gammas), 3),
                }
            )

        optimizer, seed = competition.optimizer(), section.seed
        fit(competition, batches, optimizer, Schedule(PASSES), label=SATURATION, seed=seed, on_epoch=watch)
        settings = {"settings_hash": settings_of(self.network, SATURATION), "seed": seed}
        return settings | {"steps": BATCHES, "open": OPEN, "passes": found}

    def ranking(self, way: str, seed: int) -> Ranking:
        """Scores by layer."""
        if way == TRUTH:
            if self.truth is None:
                raise SystemExit(f"{self.network}: {TRUTH!r} is not measured, there being too many")
            return self.truth
        if way in CONTROLS:
            variant = VariantSection.model_validate({"method": way, "seed": seed})
            graph = ChannelGraph(self.model, self.shape)
            return {c.prunable.name: c.scores.flatten() for c in find_candidates(self.model, graph, variant)}
        augmentation = Augmentation(crop_padding=4, flip=True)
        batches = First(Batches(dataset()["train"], dataset().info, 256, self.device, augmentation, seed))
        if way in REMEDIES:
            return remedies.ranking(way, self.model, batches, seed, self.device)
        section = section_of(way).model_copy(update={"seed": seed})
        return dict(train_knockoffs(self.model, batches, section, device=self.device))

    def top1(self, way: str, ranking: Ranking, rate: float, seed: int) -> float:
        """After surgery and recalibration."""
        plan = select_channels(
            self.model,
            ranking,
            input_shape=self.shape,
            prune_rate=rate,
            method=way if way in CONTROLS else "scop",
            seed=seed,
        )
        small = self.moved(prune(self.model, plan))
        recalibrate(small, self.plain, 20, self.device, self.dtype)
        return round(measure_accuracy(small.eval(), self.validation, self.device, self.dtype).top1, 4)

    @torch.no_grad()
    def _removals(self) -> Ranking:
        """By how much the loss of 512 training images grows when a channel is held at 0 behind its batch norm."""
        graph = ChannelGraph(self.model, self.shape)
        network = self.moved(folded_copy(self.model, graph, self.dtype))
        self.plain.set_epoch(1)
        images, labels = (torch.cat(parts) for parts in zip(*islice(self.plain, 2), strict=True))

        def loss() -> float:
            with autocast(self.device, self.dtype):
                return float(F.cross_entropy(network(images).float(), labels))

        whole = loss()
        found: Ranking = {}
        for layer in gated_layers(graph):
            increases = []
            convolution = cast(nn.Conv2d, network.get_submodule(layer))
            for channel in range(convolution.out_channels):
                hook = convolution.register_forward_hook(partial(silence, channel))
                increases.append(loss() - whole)
                hook.remove()
            found[layer] = torch.tensor(increases)
        return found

    def cached(self, name: str, make: Callable[[], Ranking]) -> Ranking:
        """What takes minutes is kept, in a folder that is no part of the repository."""
        path = CACHE / f"{self.network}-{name}.pt"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path)
        ranking: Ranking = torch.load(path, weights_only=True)
        return ranking


class First:
    """The first batches of every epoch."""

    def __init__(self, batches: Batches, count: int = BATCHES) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return min(self.count, len(self.batches))

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.batches), self.count)


def silence(channel: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook: hold a channel at 0."""
    output = output.clone()
    output[:, channel] = 0
    return output


def rank_correlation(a: Ranking, b: Ranking) -> float:
    """Spearman's, layer by layer; the mean over layers."""
    return mean(
        float(torch.corrcoef(torch.stack([a[layer].argsort().argsort(), b[layer].argsort().argsort()]).float())[0, 1])
        for layer in b
        if len(b[layer]) > 1
    )


@cache
def dataset() -> Dataset:
    """The shared CIFAR-10, of which a tenth of the training images is for validation."""
    return images(SHARED / "data" / "cifar10-jpeg.tar.gz", CACHE / "cifar10-validation", validation=0.1)


def given_resnet20() -> nn.Module:
    """The shared weights."""
    model = make_model("resnet20")
    load_weights(model, str(SHARED / "weights" / "resnet20-cifar10.safetensors"))
    return model


def given_resnet56() -> nn.Module:
    """The weights beside this file."""
    model = make_model("resnet56")
    load_weights(model, str(RESNET56))
    return model


def trained_vgg() -> nn.Module:
    """A narrow VGG, trained here for ten epochs."""
    path, device = CACHE / "vgg.pt", pick_device()
    model = make_model("tests.networks:Vgg")
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    torch.manual_seed(0)
    model = make_model("tests.networks:Vgg")
    section = DenseSection(epochs=10, lr=0.1, schedule="one_cycle", crop_padding=4, flip=True)
    augmentation = Augmentation(crop_padding=4, flip=True)
    batches = Batches(dataset()["train"], dataset().info, section.batch_size, device, augmentation, 0)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective, optimizer = Supervised(model, device, section), make_optimizer(model, section)
    fit(objective, batches, optimizer, Schedule.of(section), label="vgg")
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(model.cpu().state_dict(), path)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": given_resnet20,
    "vgg": trained_vgg,
    "resnet56": given_resnet56,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
