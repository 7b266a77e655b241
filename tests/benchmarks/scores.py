"""`make bench-scores`: quality of scores, by three measures that need no fine-tuning.

For each score and seed:

- top-1 after surgery and recalibration of the batch norms, at three rates, on 5,000 images of the validation split;
- rank correlation with the importance of a channel, the increase of the loss if it alone is removed;
- agreement of the rankings between seeds.

For the published score, also how its gates open during training (`saturation`, ResNet-20).

Names select networks and scores: ``make bench-scores ARGS="resnet20 fisher l1"``. Figures that the JSON file already
contains for the same settings are not measured again.
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
"""Batches of 256 images per score: 10,240 images. A whole epoch changes the figures by less than a seed does."""

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
"""`knockoff` sections by name. Four epochs of 40 batches have nearly as many steps as a full epoch."""

GENERATOR = "fisher, generator"
"""Measured last and with one seed, since its training takes longest."""

CONTROLS = ("l1", "bn_gamma", "fpgm", "random")
TRUTH = "removal of one channel"
SATURATION = "saturation"
PASSES = 8
"""Number of passes over `BATCHES` batches in which the published score's gates are recorded."""
OPEN = 0.95
"""Smallest gate that counts as open: its score is at least 0.9 of the batch norm's weight."""
LARGE = ("resnet56",)
"""Networks measured only with the default, the published score and the controls, and without single removals."""


def main(arguments: list[str]) -> int:
    """Measure networks and scores by name, all by default."""
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
    """Return the settings of the knockoff phase for a score."""
    return KnockoffSection.model_validate({"crop_padding": 4, "flip": True} | SETTINGS[way])


def settings_of(network: str, way: str) -> str:
    """Hash all settings that a score's figures depend on."""
    made = section_of(way).model_dump() if way in SETTINGS else remedies.SETTINGS if way in REMEDIES else {}
    if way == SATURATION:
        return settings_hash(network, way, section_of("published").model_dump(), BATCHES, PASSES, OPEN)
    return settings_hash(network, way, made, BATCHES, RATES)


class Bench:
    """A network and the data on which its scores are measured."""

    def __init__(self, network: str) -> None:
        self.network, self.device = network, pick_device()
        self.dtype = autocast_dtype(self.device, "auto")
        self.model = NETWORKS[network]().eval()
        self.validation = Batches(dataset()["validation"], dataset().info, 500, self.device)
        # Not augmented, but shuffled: images are sorted by class.
        self.plain = Batches(dataset()["train"], dataset().info, 256, self.device, Augmentation())
        self.shape = tuple(dataset()["train"].images.shape[1:])
        self.dense_top1 = measure_accuracy(
            self.moved(copy.deepcopy(self.model)), self.validation, self.device, self.dtype
        ).top1
        self.truth = None if network in LARGE else self.cached("truth", self._removals)

    def moved(self, network: nn.Module) -> nn.Module:
        """Move a network to the device."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def measure(self, way: str) -> dict[str, Any]:
        """Return all measures of a score."""
        rankings, seconds = [], []
        # Other scores are the same for every seed.
        seeded = (way in SETTINGS and way != GENERATOR) or way in REMEDIES or way == "random"
        for seed in SEEDS if seeded else SEEDS[:1]:
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
            "top1": {str(rate): [row[index] for row in top1] for index, rate in enumerate(RATES)},
            "rank_correlation_with_removal": self.truth
            and round(mean(rank_correlation(ranking, self.truth) for ranking in rankings), 3),
            "agreement_of_seeds": round(mean(pairs), 3) if pairs else None,
        }

    def saturation(self) -> dict[str, Any]:
        """Return the published score's gates after each pass, and its correlation with the batch norms' weights."""
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
        """Return scores by layer."""
        if way == TRUTH:
            if self.truth is None:
                raise SystemExit(f"{self.network}: {TRUTH!r} is not measured, since the network has too many channels")
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
        """Return top-1 after surgery and recalibration."""
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
        """Return the increase of the loss on 512 training images if a channel is set to 0 after its batch norm."""
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
        """Return a ranking that takes minutes from the cache; compute it if it does not exist."""
        path = CACHE / f"{self.network}-{name}.pt"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path)
        ranking: Ranking = torch.load(path, weights_only=True)
        return ranking


class First:
    """Yields only the first batches of every epoch."""

    def __init__(self, batches: Batches, count: int = BATCHES) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return min(self.count, len(self.batches))

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.batches), self.count)


def silence(channel: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook: set a channel to 0."""
    output = output.clone()
    output[:, channel] = 0
    return output


def rank_correlation(a: Ranking, b: Ranking) -> float:
    """Return the mean over layers of Spearman's rank correlation."""
    return mean(
        float(torch.corrcoef(torch.stack([a[layer].argsort().argsort(), b[layer].argsort().argsort()]).float())[0, 1])
        for layer in b
        if len(b[layer]) > 1
    )


@cache
def dataset() -> Dataset:
    """Return the shared CIFAR-10 with a tenth of the training images as validation split."""
    return images(SHARED / "data" / "cifar10-jpeg.tar.gz", CACHE / "cifar10-validation", validation=0.1)


def given_resnet20() -> nn.Module:
    """Return ResNet-20 with the shared weights."""
    model = make_model("resnet20")
    load_weights(model, str(SHARED / "weights" / "resnet20-cifar10.safetensors"))
    return model


def given_resnet56() -> nn.Module:
    """Return ResNet-56 with the weights in this folder."""
    model = make_model("resnet56")
    load_weights(model, str(RESNET56))
    return model


def trained_vgg() -> nn.Module:
    """Return a narrow VGG, trained for ten epochs on first use."""
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
