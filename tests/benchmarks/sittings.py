"""Work that takes longer than a sitting: each call goes on where the last one stopped, until its time is up.

What is in the JSON file already, by the same settings, is not done again, wherever it was measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from scop.config import DataSection
from scop.data.dataset import Dataset, load_dataset, save_dataset
from scop.data.sources import load_source
from scop.errors import Stopped
from tests.benchmarks.work import Plan, Work

WORK_LEFT = 3
"""The exit code of a call after which another one is needed."""
Task = tuple[Work, Callable[[], None]]
"""What is to be done, and for which network."""


@dataclass(frozen=True)
class Deadline:
    """Whether so many minutes have passed since it was made, in whichever process of this machine.

    Attributes:
        minutes: how long there is time.
        made: when it began, by the monotonic clock, in seconds.
    """

    minutes: float
    made: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return time.monotonic() > self.made + 60 * self.minutes


def images(archive: Path, folder: Path, validation: float = 0) -> Dataset:
    """The archive's images, packed once into a folder for this share of them in the validation split."""
    if not (folder / "manifest.json").exists():
        section = DataSection(source="imagefolder", path=str(archive), validation=validation)
        save_dataset(load_source(section), folder)
    return load_dataset(folder)


def work_through(
    chosen: Mapping[str, Plan],
    dataset: Dataset,
    folder: Path,
    results: Path,
    seeds: int,
    stopping: Callable[[], bool],
    prefix: str = "accuracy",
    only: Collection[str] | None = None,
    jobs: int = 1,
    graphs: bool = False,
) -> int:
    """Seed by seed, so that each network has figures as early as possible.

    PREFIX-NAME.json is written with each variant that is ready. Rows of other settings leave it with the first one.

    Args:
        chosen: plans by the network's name.
        dataset: the images.
        folder: where what is begun is kept.
        results: where the JSON files go.
        seeds: so many of each plan's.
        stopping: says when time is up; one that can be pickled for several jobs.
        prefix: of the JSON files' names.
        only: of these variants; of none for the dense networks alone.
        jobs: so many variants at a time, each in a process of its own.
        graphs: replay steps as CUDA graphs, on a GPU.

    Returns:
        0 when all is done, 3 while work is left.

    Raises:
        SystemExit: there is no such variant.
    """
    for name in only or ():
        if not any(name in plan.variants for plan in chosen.values()):
            raise SystemExit(f"no variant {name!r}")
    files = {name: results / f"{prefix}-{name}.json" for name in chosen}
    works = []
    for name, plan in chosen.items():
        earlier = json.loads(files[name].read_text())["variants"] if files[name].exists() else None
        works.append(Work(name, plan, dataset, folder, stopping, earlier, alone=jobs == 1, graphs=graphs))
    networks: list[Task] = [(work, work.prepare) for work in works]
    variants: list[Task] = [
        (work, partial(work.run, variant, seed))
        for number in range(seeds)
        for work in works
        for seed in work.plan.seeds[number : number + 1]
        for variant in work.left(seed, only)
    ]
    # Where one thing is done at a time, a network is made by its first variant.
    for tasks in [networks, variants] if jobs > 1 or not variants else [variants]:
        try:
            for work in _done(tasks, jobs):
                report = work.report()
                if report["variants"] or not files[work.name].exists():
                    files[work.name].write_text(json.dumps(report, indent=1) + "\n")
                print(work.name, {key: row["top1"] for key, row in report["variants"].items()}, flush=True)
        except Stopped as stop:
            print(f"{stop}; the same command goes on", flush=True)
            return WORK_LEFT
    return 0


def _done(tasks: Sequence[Task], jobs: int) -> Iterator[Work]:
    """Do tasks, and say whose is done as soon as one is.

    A GPU has room for several small networks; what has used one cannot be forked, so processes start anew.
    """
    if jobs == 1:
        for work, do in tasks:
            do()
            yield work
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        begun = {pool.submit(do): work for work, do in tasks}
        try:
            for future in as_completed(begun):
                future.result()
                yield begun[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
