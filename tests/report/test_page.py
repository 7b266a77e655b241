"""Tests of the results page in headless Chromium."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scop.report.page
from scop.report.figures.axes import share_limits
from scop.report.figures.points import dense_points, pareto_front, points
from scop.report.metrics import describe
from scop.report.page import Page
from scop.report.results import Result
from scop.system.cost import Spent
from tests.fakes.browser import browser_tab, opened
from tests.fakes.results import EVALUATION, SWEEP, result


def write_page(folder: Path, results: list[Result], **more: Any) -> Path:
    page = Page("A <b>sweep</b>", results, {0: EVALUATION}, **more)
    page.write(folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all pages: Chromium compiles scripts once per URL."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    with browser_tab() as tab:
        yield tab


@pytest.fixture(params=[360, 1440])
def page(tab: Any, folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    missing = {"never": "finetune failed: <i>out of memory</i>"}
    spent = [Spent("2 runs", "a GPU", 5400, 2_880_000)]
    with opened(tab, write_page(folder, SWEEP, missing=missing, spent=spent), request.param) as view:
        yield view


def names(view: Any) -> list[str]:
    return view.locator("#table .tabulator-row .tabulator-cell.name").all_inner_texts()


def heading(view: Any, column: str) -> Any:
    return view.locator(f"#table .tabulator-col[tabulator-field={column}]")


def column(view: Any, field: str) -> list[str]:
    cells = view.locator(f"#table .tabulator-cell[tabulator-field={field}] > div > :first-child")
    return cells.all_inner_texts()


def drawn(view: Any, plot: str) -> list[str]:
    """Return the names of the series of a plot."""
    return view.evaluate(f"document.getElementById('{plot}').data.map((trace) => trace.name)")


def test_clicking_a_heading_sorts_and_reverses(page: Any) -> None:
    assert names(page)[0] == "scop-0.3"  # the most accurate
    assert heading(page, "pruned_top1").get_attribute("aria-sort") == "descending"
    heading(page, "pruned_macs").get_by_role("button").click()
    assert {name.partition("-")[2] for name in names(page)[:6]} == {"0.5"}
    assert names(page)[:2] == ["scop-0.5", "scop-0.5"]  # equal MACs: the most accurate first
    heading(page, "pruned_macs").get_by_role("button").press("Enter")  # by keyboard too
    assert {name.partition("-")[2] for name in names(page)[:6]} == {"0.3"}
    assert names(page)[:2] == ["scop-0.3", "scop-0.3"]
    assert heading(page, "pruned_macs").get_attribute("aria-sort") == "descending"
    heading(page, "method").get_by_role("button").click()
    assert names(page)[0].startswith("l1")


def test_sorts_numbers_by_value_and_missing_ones_last(tab: Any, folder: Path) -> None:
    rows = [result(rate=rate, params=result().params | {"finetune_lr": lr}) for rate, lr in ((0.02, 1e-5), (0.2, 0.1))]
    with opened(
        tab, write_page(folder, [*rows, result("l1"), result("random", metrics={"dense_top1": 0.9})]), 1440
    ) as view:
        heading(view, "finetune_lr").get_by_role("button").click()
        assert names(view)[:2] == ["scop-0.02", "scop-0.2"]
        heading(view, "finetune_lr").get_by_role("button").click()
        assert names(view)[:2] == ["scop-0.2", "scop-0.02"]
        for _ in ("ascending", "descending"):
            heading(view, "pruned_bytes").get_by_role("button").click()
            assert names(view)[-1] == "random-0.5"
        assert column(view, "pruned_bytes") == ["1.06 MB", "704 kB", "275 kB", "\u2013"]


def test_filter_applies_to_table_and_plot(page: Any) -> None:
    assert page.locator("#pareto .scatterlayer .point").count() == 6 + 1  # six groups and the dense network
    page.locator("#filter").fill("l1 0.5")
    assert names(page) == ["l1-0.5", "l1-0.5"]
    assert page.locator("#count").inner_text() == "2 of 12"
    assert page.locator("#pareto .scatterlayer .point").count() == 1 + 1
    page.locator("#filter").fill("no such network")
    assert names(page) == []
    assert page.locator("#table .tabulator-placeholder").is_visible()
    assert not page.locator("#details").is_visible()
    page.locator("#filter").fill("")
    assert len(names(page)) == 12
    assert page.locator("#details").is_visible()


def test_switches_axes_and_ungroups_seeds(page: Any) -> None:
    assert page.locator("#pareto .xtitle").text_content() == "MACs"
    page.locator("#x-axis").select_option(label="latency, batch 1")
    assert page.locator("#pareto .xtitle").text_content() == "latency, batch 1, ms"
    page.locator("#y-axis").select_option("top1_drop")
    assert page.locator("#pareto .ytitle").text_content() == "drop"
    assert page.locator("#pareto .yerror").count() > 0
    page.locator("#group").uncheck()
    assert page.locator("#pareto .scatterlayer .point").count() == 12


def test_hovering_shows_details_and_clicking_selects_the_row(page: Any) -> None:
    page.locator("#group").uncheck()
    page.locator("#pareto").scroll_into_view_if_needed()
    box = page.locator("#pareto .scatterlayer .trace:has(.point) .point").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.wait_for_selector("#pareto .hovertext")
    text = page.locator("#pareto .hovertext").first.text_content()
    box = page.locator("#pareto .hovertext path").first.bounding_box()
    assert 0 <= box["x"] < box["x"] + box["width"] <= page.viewport_size["width"]
    assert "scop-0." in text
    assert "top-1" in text
    assert "run run-scop-0." in text
    assert "scop rerun 'a run/scop/evaluate/evaluation'" in text
    page.mouse.click(x, y)
    page.wait_for_selector("#table .tabulator-selected")
    assert page.locator("#table .tabulator-selected .name").inner_text().startswith("scop-0.")
    page.wait_for_function("document.activeElement.closest('.tabulator-selected')")


def test_clicking_a_point_scrolls_to_its_row(tab: Any, folder: Path) -> None:
    with opened(tab, write_page(folder, [result("scop", 0.001 * number) for number in range(300)]), 1440) as view:
        assert view.locator("#table .tabulator-row .name", has_text="scop-0.299").count() == 0
        least = "document.getElementById('pareto').data.find((trace) => trace.mode === 'markers').customdata.at(-1)"
        view.evaluate(f"document.getElementById('pareto').emit('plotly_click', {{points: [{{customdata: {least}}}]}})")
        view.wait_for_selector("#table .tabulator-selected")
        assert view.locator("#table .tabulator-selected .name").inner_text() == "scop-0.299"
        view.wait_for_function("document.activeElement.closest('.tabulator-selected')")


def test_choosing_a_row_shows_only_its_plots(tab: Any, folder: Path) -> None:
    page = Page("A sweep", SWEEP, {0: EVALUATION, 4: EVALUATION, 5: EVALUATION})
    page.write(folder / "page.html")
    with opened(tab, folder / "page.html", 1440) as view:
        assert drawn(view, "kept-channels") == ["scop-0.3", "l1-0.3", "l1-0.3 (2)"]
        assert drawn(view, "learning-curves") == ["dense", "scop-0.3", "l1-0.3", "l1-0.3 (2)"]
        colour = view.evaluate("document.getElementById('kept-channels').data[1].marker.color")
        row = view.locator("#table .tabulator-row", has_text="run-l1-0.3-0")
        row.get_by_role("button").click()
        assert row.get_by_role("button").get_attribute("aria-pressed") == "true"
        assert drawn(view, "kept-channels") == ["l1-0.3"]
        assert view.evaluate("document.getElementById('kept-channels').data[0].marker.color") == colour
        assert drawn(view, "learning-curves") == ["dense", "l1-0.3"]
        assert view.locator("#confusion-of option").all_inner_texts() == ["l1-0.3"]
        row.get_by_role("button").click()
        assert row.get_by_role("button").get_attribute("aria-pressed") == "false"
        assert len(drawn(view, "kept-channels")) == 3
        view.locator("#confusion-of").select_option("l1-0.3 (2)")
        assert view.locator("#confusion").get_attribute("aria-label").startswith("Confusion matrix of l1-0.3 (2), ")
        view.locator("#filter").fill("scop")
        assert drawn(view, "kept-channels") == ["scop-0.3"]


def test_layer_bar_lists_uncertain_channels(page: Any) -> None:
    bar = page.locator("#kept-channels .bars .point").first
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#kept-channels .hovertext")
    text = page.locator("#kept-channels .hovertext").first.text_content()
    assert "4 of 16 channels" in text
    assert "kept, uncertain: 3" in text
    assert "removed, uncertain: 5, 7" in text
    assert page.locator("#kept-channels .errorbar").count() >= 1


def test_every_plot_has_an_aria_label(page: Any) -> None:
    labels = {plot.get_attribute("id"): plot.get_attribute("aria-label") for plot in page.locator(".plot").all()}
    assert labels["pareto"].startswith("6 networks by MACs and top-1; Pareto front: 2; best top-1: scop-0.3")
    assert "keeps the smallest share in conv1: 25%" in labels["kept-channels"]
    assert "ends at 80.00% on the validation split" in labels["learning-curves"]
    assert "Most frequent error: cat classified as" in labels["confusion"]
    assert "2 layers" in labels["scores"]


def test_shows_failures_and_costs_without_interpreting_markup(page: Any) -> None:
    assert page.locator(".missing").inner_text() == "never: finetune failed: <i>out of memory</i>"
    assert page.locator("h1").inner_text() == "A <b>sweep</b>"
    assert page.locator("section", has_text="Compute time and energy").locator("td").all_inner_texts() == [
        "a GPU",
        "1.5 h",
        "800.0 Wh",
    ]


def test_claims_better_only_if_the_interval_excludes_zero(tab: Any, folder: Path) -> None:
    top1 = {"scop": (0.92, 0.93, 0.94), "l1": (0.91, 0.921, 0.929), "random": (0.90, 0.96, 0.91)}
    rows = [
        result(method, 0.5, seed, metrics=result().metrics | {"pruned_top1": own})
        for method, every in top1.items()
        for seed, own in enumerate(every)
    ]
    with opened(tab, write_page(folder, rows), 1440) as view:
        against_l1, against_random = (
            view.locator("section", has_text="Paired comparison").locator("li").all_inner_texts()
        )
    assert against_l1.startswith("scop-0.5 is better than l1-0.5 at the same MACs: +1.00 points of top-1")
    assert against_random.startswith("scop-0.5 vs. random-0.5 at the same MACs: +0.67 points of top-1")
    assert against_random.endswith("no significant difference.")


def test_prints_to_pdf(tab: Any, folder: Path) -> None:
    with opened(tab, write_page(folder, SWEEP), 1440) as view:
        view.emulate_media(media="print")
        content = view.pdf()
        assert content.startswith(b"%PDF")
        assert len(content) > 20_000
        assert not view.locator("#filter").is_visible()
        view.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert view.locator("#results td.code", has_text="scop rerun").count() == 12
        assert view.locator("#results tbody strong").count() > 0
        view.evaluate("window.dispatchEvent(new Event('afterprint'))")


def test_plots_show_their_run_and_rerun_command(page: Any) -> None:
    assert page.locator("#of-runs").inner_text().strip() == (
        "scop-0.3: run run-scop-0.3-0; scop rerun 'a run/scop/evaluate/evaluation'"
    )


def test_best_value_of_each_column_is_bold(tab: Any, folder: Path) -> None:
    without = {key: value for key, value in result("random", 0.4).metrics.items() if key != "pruned_macs"}
    rows = [result("scop", 0.3), result("l1", 0.5), result(name="lacking", metrics=without)]
    with opened(tab, write_page(folder, rows), 1440) as view:
        bold = {
            (row.locator(".name").inner_text(), cell.get_attribute("tabulator-field"))
            for row in view.locator("#table .tabulator-row").all()
            for cell in row.locator(".tabulator-cell:has(strong)").all()
        }
        assert {("scop-0.3", "pruned_top1"), ("scop-0.3", "top1_drop"), ("l1-0.5", "pruned_macs")} <= bold
        assert "lacking" not in {name for name, _ in bold}
        view.locator("#filter").fill("l1")
        assert view.locator("#table strong").count() == 0  # a single row
        view.locator("#filter").fill("")
        assert view.locator("#table strong").count() == len(bold)
    only = [result("scop", 0.3), result(name="lacking", metrics={"pruned_top1": 0.5, "dense_top1": 0.6})]
    with opened(tab, write_page(folder, only), 1440) as view:
        assert view.locator("#table strong").all_inner_texts()[0].startswith("92.5")
        assert not view.locator("#table strong", has_text="\u2013").count()


def test_dark_mode_prints_dark_text_on_white(tab: Any, folder: Path) -> None:
    with opened(tab, write_page(folder, SWEEP), 1440, color_scheme="dark") as view:
        ink = "getComputedStyle(document.querySelector('#pareto .xtitle')).fill"
        on_screen = view.evaluate(ink)
        view.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert view.evaluate(ink) == "rgb(28, 37, 48)"
        view.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert view.evaluate(ink) == on_screen == "rgb(230, 234, 240)"


def test_escapes_names_that_look_like_markup(tab: Any, folder: Path) -> None:
    name = "<!--<script><b>scop"
    with opened(tab, write_page(folder, [result(name=name), result("l1")]), 1440) as view:
        assert names(view) == [name, "l1-0.5"]
        assert name in view.locator("#learning-curves .legend").text_content()


def test_runs_of_one_recipe_share_a_point_with_a_visible_error_bar(tab: Any, folder: Path) -> None:
    rows = [result(seed=0), result(seed=200), result(seed=0, params=result().params | {"recipe": "another"})]
    with opened(tab, write_page(folder, rows), 1440) as view:
        assert view.locator("#pareto .scatterlayer .point").count() == 2 + 1
        low, high = view.evaluate("document.getElementById('pareto').layout.yaxis.range")
        mean, deviation = 0.915 - 0.1, 0.2 / 2**0.5
        assert low < mean - deviation < mean + deviation < high


def test_keyboard_focus_stays_on_the_selected_row(page: Any) -> None:
    page.locator("#table .name button").nth(1).press("Enter")
    assert page.evaluate("document.activeElement.closest('.tabulator-selected') !== null")
    page.locator("#filter").fill("l1")
    assert not page.locator("#table .tabulator-selected").count()


def test_shows_one_data_set_and_device_at_a_time(tab: Any, folder: Path) -> None:
    others = [result("l1", 0.4, device="a GPU"), result("l1", 0.2, dataset="e1" * 32)]
    with opened(tab, write_page(folder, [*SWEEP[:4], *others]), 1440) as view:
        assert view.locator("#count").inner_text() == "4 of 4, and 2 on other data or devices"
        view.locator("#device").select_option("a GPU")
        assert names(view) == ["l1-0.4"]
        view.locator("#device").select_option("a CPU")
        view.locator("#dataset").select_option("e1" * 32)
        assert names(view) == ["l1-0.2"]


def test_renders_only_visible_rows_but_prints_all(tab: Any, folder: Path) -> None:
    with opened(tab, write_page(folder, [result("scop", 0.0001 * number) for number in range(2000)]), 1440) as view:
        assert view.locator("#count").inner_text() == "2000 of 2000"
        assert 0 < view.locator("#table .tabulator-row").count() < 200
        view.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert view.locator("#results tbody tr").count() == 2000
        view.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert view.locator("#results tbody tr").count() == 0


def test_reports_a_network_without_plots(page: Any) -> None:
    page.locator("#table .name button", has_text="random-0.5").first.click()
    note = page.locator("#of-runs").inner_text()
    assert note.startswith("This page has no plots for random-0.5; the plots below show other networks.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_keyboard_focus(tab: Any, folder: Path, scheme: str) -> None:
    with opened(tab, write_page(folder, SWEEP), 1440, color_scheme=scheme) as view:
        ratio = """() => {
          const of = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const back = of(getComputedStyle(document.body).backgroundColor);
          const texts = document.querySelectorAll("h1, .note, .facts, td, small, #table :is(button, strong, code)");
          return Math.min(...[...texts]
            .map((one) => of(getComputedStyle(one).color)).map((one) =>
              (Math.max(one, back) + 0.05) / (Math.min(one, back) + 0.05)));
        }"""
        assert view.evaluate(ratio) >= 4.5  # WCAG 2.2, AA
        view.keyboard.press("Tab")
        assert view.evaluate("document.activeElement.textContent") == "Skip to the table"


def test_page_and_pictures_agree_on_front_and_limits(tab: Any, folder: Path) -> None:
    macs, top1 = describe("pruned_macs"), describe("pruned_top1")
    by_index = dict(enumerate(SWEEP))
    found, dense = (make(by_index, [macs.key, top1.key]) for make in (points, dense_points))
    with opened(tab, write_page(folder, SWEEP), 1440) as view:
        front, limits = view.evaluate("""() => {
          const { data: [{ x, y }], layout } = document.getElementById("pareto");
          return [x.map((value, index) => [value, y[index]]), layout.yaxis.range];
        }""")
    assert front == [[p.values[macs.key][0], p.values[top1.key][0]] for p in pareto_front(found, macs, top1)]
    ends = [p.values[top1.key][0] + sign * p.values[top1.key][1] for p in (*found, *dense) for sign in (-1, 1)]
    assert limits == pytest.approx(share_limits(ends))


def test_vendored_files_are_those_of_the_readme() -> None:
    vendor = Path(scop.report.page.__file__).parent / "vendor"
    hashes = dict(re.findall(r"^\| `(\S+)` \| .* \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.M))
    assert set(hashes) == {path.name for path in vendor.iterdir()} - {"README.md", "LICENSE"}
    for name, sha256 in hashes.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == sha256
    text = Page("A sweep", SWEEP).render()
    assert "Copyright (c) 2015-2026 Oli Folkerd" in text
    assert "sourceMappingURL" not in text
