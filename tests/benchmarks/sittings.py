"""Long benchmarks in several calls: each call resumes the last one and stops when its time is up.

Figures that the JSON file already contains for the same settings are not measured again, even on another machine.
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
"""Exit code of a call that leaves work to do."""
Task = tuple[Work, Callable[[], None]]
"""A network's work, and a function that does part of it."""


@dataclass(frozen=True)
class Deadline:
    """Callable that returns whether the time is up, in any process of this machine.

    Attributes:
        minutes: time available.
        made: start of that time on the monotonic clock, in seconds.
    """

    minutes: float
    made: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return time.monotonic() > self.made + 60 * self.minutes


def images(archive: Path, folder: Path, validation: float = 0) -> Dataset:
    """Return the archive's images, with this share as validation split; they are packed into the folder once."""
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
    """Measure all variants, seed by seed, so that each network has figures early.

    PREFIX-NAME.json is written after each variant. The first write removes rows with other settings.

    Args:
        chosen: plans by network name.
        dataset: the images.
        folder: folder for intermediate files.
        results: folder for the JSON files.
        seeds: number of seeds per plan.
        stopping: returns whether the time is up; must be picklable if there are several jobs.
        prefix: prefix of the JSON files' names.
        only: only these variants; if empty, only the dense networks.
        jobs: number of variants at a time, each in its own process.
        graphs: replay steps as CUDA graphs, on a GPU.

    Returns:
        0 if all is done, 3 if work is left.

    Raises:
        SystemExit: a variant in `only` does not exist.
    """
    for name in only or ():
        if not any(name in plan.variants for plan in chosen.values()):
            raise SystemExit(f"unknown variant {name!r}")
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
    # With one job, the first variant of a network prepares it.
    for tasks in [networks, variants] if jobs > 1 or not variants else [variants]:
        try:
            for work in _done(tasks, jobs):
                report = work.report()
                if report["variants"] or not files[work.name].exists():
                    files[work.name].write_text(json.dumps(report, indent=1) + "\n")
                print(work.name, {key: row["top1"] for key, row in report["variants"].items()}, flush=True)
        except Stopped as stop:
            print(f"{stop}; run the same command again to resume", flush=True)
            return WORK_LEFT
    return 0


def _done(tasks: Sequence[Task], jobs: int) -> Iterator[Work]:
    """Run the tasks and yield the work of each one as soon as it is finished.

    A GPU has room for several small networks. A process that has used a GPU cannot be forked, so processes are spawned.
    """
    if jobs == 1:
        for work, do in tasks:
            do()
            yield work
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(do): work for work, do in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
