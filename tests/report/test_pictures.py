"""Tests of the plots' content, and of the pictures drawn from it."""

from pathlib import Path

from PIL import Image

from scop.report.figures.points import pareto_front, points
from scop.report.metrics import describe
from scop.report.page import Page
from scop.report.page.pictures import write_pictures
from tests.fakes.results import EVALUATION, SWEEP, result


def test_writes_pictures_with_error_bars_over_seeds(tmp_path: Path) -> None:
    page = Page("A sweep", [*SWEEP, result("l1", 0.2, dataset="e1" * 32)], {0: EVALUATION, 1: EVALUATION})
    written = {path.name for path in write_pictures(page, tmp_path / "png")}
    assert written == {path.name for path in (tmp_path / "png").iterdir()}
    assert {"kept-channels.png", "learning-curves.png", "scores.png"} <= written
    assert {"confusion-scop-0.3.png", "confusion-scop-0.3-2.png"} <= written  # two seeds
    assert {"accuracy-macs-digits-d0d0d0d0.png", "accuracy-macs-digits-e1e1e1e1.png"} <= written
    assert all((tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG") for name in written)
    description = Image.open(tmp_path / "png" / "confusion-scop-0.3.png").text["Description"]
    assert description == "scop-0.3: run run-scop-0.3-0; scop rerun 'a run/scop/evaluate/evaluation'"
    lines = Image.open(tmp_path / "png" / "accuracy-macs-digits-d0d0d0d0.png").text["Description"].splitlines()
    assert len(lines) == len(SWEEP)


def test_averages_over_seeds_and_finds_the_pareto_front() -> None:
    macs, top1 = describe("pruned_macs"), describe("pruned_top1")
    found = points(dict(enumerate(SWEEP)), [macs.key, top1.key])
    assert len(found) == 6
    assert all(point.values[top1.key][1] > 0 for point in found)
    assert [point.name for point in pareto_front(found, macs, top1)] == ["scop-0.5", "scop-0.3"]
    assert len(points(dict(enumerate(SWEEP)), [macs.key], over_seeds=False)) == 12
