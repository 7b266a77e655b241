"""`make bench-scores`: quality of scores, by three measures that need no fine-tuning.

For each score and seed:

- top-1 after surgery and recalibration of the batch norms, at three rates, on 5,000 images of the validation split;
- rank correlation with the importance of a channel, the increase of the loss if it alone is removed;
- agreement of the rankings between seeds.

Names select networks and scores: ``make bench-scores ARGS="resnet20 fisher l1"``. Figures that the JSON file already
contains for the same settings are not measured again.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import combinations, islice
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop import prune, select_channels, train_knockoffs
from scop.compute.device import autocast, autocast_dtype, pick_device
from scop.config import KnockoffSection, VariantSection
from scop.data.batches import Augmentation, Batches
from scop.knockoffs.phase import gated_layers
from scop.models.evaluation import measure_accuracy
from scop.models.folding import folded_copy
from scop.pruning.graph import ChannelGraph
from scop.selection.candidates import find_candidates
from scop.training.supervised import recalibrate
from tests.benchmarks.inputs import AUGMENTATION, AUGMENTED, CACHE, given_resnet20, images, trained_vgg
from tests.benchmarks.measure import RESULTS, machine, settings_hash

NETWORKS = {"resnet20": given_resnet20, "vgg": trained_vgg}
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
"""Measured with one seed, since its training takes longest."""
CONTROLS = ("l1", "bn_gamma", "fpgm", "random")
TRUTH = "removal of one channel"
WAYS = {"resnet20": [*SETTINGS, *CONTROLS, TRUTH], "vgg": ["fisher", "published", *CONTROLS]}
"""Scores by network, in the order of measurement."""


def main(arguments: list[str]) -> int:
    """Measure networks and scores by name, all by default."""
    for network in [name for name in NETWORKS if name in arguments] or NETWORKS:
        path = RESULTS / f"scores-{network}.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"ways": {}}
        bench: Bench | None = None
        for way in [way for way in WAYS[network] if way in arguments] or WAYS[network]:
            if results["ways"].get(way, {}).get("settings_hash") == settings_of(network, way):
                continue
            bench = bench or Bench(network)
            results["ways"][way] = bench.measure(way) | {"machine": machine()}
            results |= {"dense_top1": bench.dense_top1, "command": "make bench-scores"}
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(network, way, results["ways"][way]["top1"], flush=True)
    return 0


def section_of(way: str) -> KnockoffSection:
    """Return the settings of the knockoff phase for a score."""
    return KnockoffSection.model_validate(AUGMENTED | SETTINGS[way])


def settings_of(network: str, way: str) -> str:
    """Hash all settings that a score's figures depend on."""
    return settings_hash(network, way, section_of(way).model_dump() if way in SETTINGS else {}, BATCHES, RATES)


class Bench:
    """A network and the data on which its scores are measured."""

    def __init__(self, network: str) -> None:
        self.network, self.device, self.dataset = network, pick_device(), images(validation=0.1)
        self.dtype = autocast_dtype(self.device, "auto")
        self.model = NETWORKS[network]().eval()
        self.validation = Batches(self.dataset["validation"], self.dataset.info, 500, self.device)
        # Not augmented, but shuffled: images are sorted by class.
        self.plain = Batches(self.dataset["train"], self.dataset.info, 256, self.device, Augmentation())
        self.shape = self.dataset.info.shape
        self.dense_top1 = self.accuracy(copy.deepcopy(self.model))
        self.truth = self._truth()

    def augmented(self, seed: int) -> First:
        """Return the batches on which scores are made."""
        return First(Batches(self.dataset["train"], self.dataset.info, 256, self.device, AUGMENTATION, seed))

    def accuracy(self, network: nn.Module) -> float:
        """Return top-1 on the validation split."""
        return measure_accuracy(self.moved(network).eval(), self.validation, self.device, self.dtype).top1

    def moved(self, network: nn.Module) -> nn.Module:
        """Move a network to the device."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def measure(self, way: str) -> dict[str, Any]:
        """Return all measures of a score."""
        rankings, seconds = [], []
        # Other scores are the same for every seed.
        seeded = (way in SETTINGS and way != GENERATOR) or way == "random"
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
            "rank_correlation_with_removal": round(mean(rank_correlation(r, self.truth) for r in rankings), 3),
            "agreement_of_seeds": round(mean(pairs), 3) if pairs else None,
        }

    def ranking(self, way: str, seed: int) -> Ranking:
        """Return scores by layer."""
        if way == TRUTH:
            return self.truth
        if way in CONTROLS:
            variant = VariantSection.model_validate({"method": way, "seed": seed})
            graph = ChannelGraph(self.model, self.shape)
            return {c.prunable.name: c.scores.flatten() for c in find_candidates(self.model, graph, variant)}
        section = section_of(way).model_copy(update={"seed": seed})
        return dict(train_knockoffs(self.model, self.augmented(seed), section, device=self.device))

    def top1(self, way: str, ranking: Ranking, rate: float, seed: int) -> float:
        """Return top-1 after surgery and recalibration."""
        method = way if way in CONTROLS else "scop"
        variant = VariantSection.model_validate({"method": method, "prune_rate": rate, "seed": seed})
        plan = select_channels(self.model, ranking, input_shape=self.shape, variant=variant)
        small = self.moved(prune(self.model, plan))
        recalibrate(small, self.plain, 20, self.device, self.dtype)
        return round(self.accuracy(small), 4)

    def _truth(self) -> Ranking:
        """Return the importance of each channel. It takes minutes and is stored."""
        path = CACHE / f"{self.network}-truth.pt"
        if not path.exists():
            torch.save(self._removals(), path)
        ranking: Ranking = torch.load(path, weights_only=True)
        return ranking

    @torch.no_grad()
    def _removals(self) -> Ranking:
        """Return the increase of the loss on 512 training images if a channel is set to 0 after its batch norm."""
        graph = ChannelGraph(self.model, self.shape)
        network = self.moved(folded_copy(self.model, graph, self.dtype))
        self.plain.set_epoch(1)
        inputs, labels = (torch.cat(parts) for parts in zip(*islice(self.plain, 2), strict=True))

        def loss() -> float:
            with autocast(self.device, self.dtype):
                return float(F.cross_entropy(network(inputs).float(), labels))

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


class First:
    """Yields only the first `BATCHES` batches of every epoch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return min(BATCHES, len(self.batches))

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.batches), BATCHES)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
