"""The report of a run: one HTML file that needs nothing else, and the same figures as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from scop.text import human

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too light on white.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"]
_NEUTRAL = "#7a8594"


@dataclass(frozen=True)
class VariantResult:
    """What the steps found out about one variant: the contents of evaluation.json and export.json."""

    evaluation: Mapping[str, Any]
    export: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.evaluation["variant"])

    def summary(self) -> dict[str, Any]:
        """The variant's entry in summary.json."""
        figures = ("top1", "top5", "params", "macs", "bytes", "latency_ms")
        return {
            "name": self.name,
            "method": self.evaluation["method"],
            "prune_rate": self.evaluation["prune_rate"],
            "dense": {key: self.evaluation["dense"][key] for key in figures},
            "pruned": {key: self.evaluation["pruned"][key] for key in figures},
            "exactness": self.export["exactness"],
            "model": self.export["model"],
            "onnx": self.export["onnx"],
        }


def write_report(
    results: Sequence[VariantResult],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    title: str,
    missing: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Args:
        results: of the variants, in the configuration's order.
        scores: layer -> {"gate": [...], "score": [...]}, as scores.json has them; empty for none.
        path: the HTML file.
        title: the page's heading.
        missing: why there is no result, by variant.
    """
    colours = {result.name: _COLOURS[place % len(_COLOURS)] for place, result in enumerate(results)}
    first = results[0].evaluation
    sections = [
        ("Results", _table(results) + _list_of(missing or {})),
        ("Accuracy against cost", _plot(_accuracy_against_macs(results, colours), "accuracy-macs", 420)),
        ("Kept channels per layer", _plot(_kept_channels(results, colours), "kept-channels", None)),
        ("Learning curves", _plot(_learning_curves(results, colours), "learning-curves", 420)),
    ]
    if scores:
        histograms = _score_text() + _plot(_score_histograms(scores), "scores", None)
        sections.insert(-1, ("Score histograms", histograms))
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections)
    facts = (
        f"{first['dataset']['source']}, {first['dataset']['test']:,} test images. "
        f"Latency: {first['device']}, {first['threads']} threads, float32."
    )
    path.write_text(
        _PAGE.replace("{{title}}", html.escape(title))
        .replace("{{facts}}", html.escape(facts))
        .replace("{{body}}", body)
        .replace("{{plotly}}", get_plotlyjs()),
        encoding="utf-8",
    )


# -- table -------------------------------------------------------------------------------------------------------------


def _table(results: Sequence[VariantResult]) -> str:
    batch_sizes = list(results[0].evaluation["dense"]["latency_ms"])
    header = ["network", "top-1", "top-5", "parameters", "MACs", "file", *(f"latency, batch {b}" for b in batch_sizes)]
    rows = [_row("dense", results[0].evaluation["dense"], None, batch_sizes)]
    rows += [_row(r.name, r.evaluation["pruned"], r.evaluation["dense"], batch_sizes) for r in results]
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>' + (
        "<p class=note>Latency is the median of one forward pass (95th percentile in brackets). Each variant took "
        "turns with the dense network in one process; what that took then stands below it, so compare the ratios: a "
        "machine is not equally fast all the time. Below the other figures: the change against the dense network.</p>"
    )


def _list_of(missing: Mapping[str, str]) -> str:
    entries = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(why)}</li>" for name, why in missing.items())
    return f"<p>There is no result of:</p><ul>{entries}</ul>" if missing else ""


def _row(name: str, figures: Mapping[str, Any], dense: Mapping[str, Any] | None, batch_sizes: Sequence[str]) -> str:
    cells = [
        _cell(f"{figures['top1']:.2%}", _points(figures, dense, "top1")),
        _cell(f"{figures['top5']:.2%}", _points(figures, dense, "top5")),
        _cell(human(figures["params"]), _share(figures, dense, "params")),
        _cell(human(figures["macs"]), _share(figures, dense, "macs")),
        _cell(human(figures["bytes"], "B"), _share(figures, dense, "bytes")),
    ]
    for batch_size in batch_sizes:
        latency = figures["latency_ms"][batch_size]
        before = dense and dense["latency_ms"][batch_size]["p50"]
        change = f"{before / latency['p50']:.2f}x as fast as {before:.2f} ms" if before else ""
        cells.append(_cell(f"{latency['p50']:.2f} ms ({latency['p95']:.2f})", change))
    return f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>'


def _cell(value: str, change: str) -> str:
    return f"<td>{value}<small>{change}</small></td>"


def _points(figures: Mapping[str, Any], dense: Mapping[str, Any] | None, key: str) -> str:
    return f"{(figures[key] - dense[key]) * 100:+.2f} points" if dense else ""


def _share(figures: Mapping[str, Any], dense: Mapping[str, Any] | None, key: str) -> str:
    return f"{figures[key] / dense[key] - 1:+.1%}" if dense else ""


# -- plots -------------------------------------------------------------------------------------------------------------


def _accuracy_against_macs(results: Sequence[VariantResult], colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    dense = results[0].evaluation["dense"]
    points = [("dense", dense, _NEUTRAL, "diamond")]
    points += [(r.name, r.evaluation["pruned"], colours[r.name], "circle") for r in results]
    for name, figures, colour, symbol in points:
        figure.add_scatter(
            x=[figures["macs"]],
            y=[figures["top1"]],
            name=name,
            mode="markers",
            marker={"size": 13, "color": colour, "symbol": symbol},
            customdata=[[human(figures["params"]), human(figures["macs"])]],
            hovertemplate="<b>%{fullData.name}</b><br>top-1 %{y:.2%}<br>%{customdata[1]} MACs, "
            "%{customdata[0]} parameters<extra></extra>",
        )
    figure.update_xaxes(title="multiply-accumulates per image", rangemode="tozero")
    figure.update_yaxes(title="top-1 on the test split", tickformat=".1%", **_span([p[1]["top1"] for p in points]))
    return figure


def _kept_channels(results: Sequence[VariantResult], colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    layers: list[str] = []
    channels: dict[str, int] = {}
    for result in results:
        layers += [layer for layer in result.evaluation["kept"] if layer not in layers]
        channels |= result.evaluation["channels"]
    for result in results:
        kept = result.evaluation["kept"]
        figure.add_bar(
            y=layers,
            x=[kept.get(layer, channels[layer]) / channels[layer] for layer in layers],
            customdata=[[kept.get(layer, channels[layer]), channels[layer]] for layer in layers],
            name=result.name,
            orientation="h",
            marker={"color": colours[result.name]},
            hovertemplate="%{y}: %{customdata[0]} of %{customdata[1]} channels<extra>%{fullData.name}</extra>",
        )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, automargin=True)
    figure.update_xaxes(title="share of channels kept", tickformat=".0%", range=[0, 1.04], dtick=0.25)
    figure.update_layout(barmode="group", height=140 + len(layers) * max(18, 9 * len(results)))
    return figure


def _score_text() -> str:
    return (
        "<p>W is the batch norm's absolute weight times how far a channel's gate moved towards its real feature (1) "
        "or its knockoff (&minus;1). A row is a layer's histogram: the darker, the more of its channels score there. "
        "Channels at the left are the first to go.</p>"
    )


def _score_histograms(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    values = {layer: np.asarray(entry["score"]) for layer, entry in scores.items()}
    everything = np.concatenate(list(values.values()))
    edges = np.linspace(min(everything.min(), 0), max(everything.max(), 0) + 1e-9, 51)
    counts = {layer: np.histogram(of_layer, edges)[0] for layer, of_layer in values.items()}
    figure = go.Figure(
        go.Heatmap(
            y=list(counts),
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            # Shares, since layers differ in width; empty bins show the background.
            z=[[share or None for share in (row / row.sum()).tolist()] for row in counts.values()],
            customdata=[row.tolist() for row in counts.values()],
            colorscale=[[0, "rgba(0,114,178,0.15)"], [1, "rgba(0,114,178,1)"]],
            showscale=False,
            xgap=1,
            ygap=3,
            hovertemplate="%{y}: %{customdata} channels with W about %{x:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 10}, automargin=True, showgrid=False)
    figure.update_xaxes(title="knockoff score W", zeroline=True)
    figure.update_layout(height=120 + 22 * len(scores))
    return figure


def _learning_curves(results: Sequence[VariantResult], colours: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    curves = [("dense", results[0].evaluation["dense_history"], _NEUTRAL)]
    curves += [(r.name, r.evaluation["history"], colours[r.name]) for r in results]
    for name, history, colour in curves:
        validated = all(record.get("validation_top1") is not None for record in history)
        key, kind = ("validation_top1", "validation") if validated else ("top1", "training")
        if history:
            figure.add_scatter(
                x=[record["epoch"] for record in history],
                y=[record[key] for record in history],
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 5},
                hovertemplate=f"epoch %{{x}}: {kind} top-1 %{{y:.2%}}<extra>{html.escape(name)}</extra>",
            )
    longest = max((len(history) for _, history, _ in curves), default=1)
    figure.update_xaxes(title="epoch", dtick=max(1, round(longest / 10)), tick0=0, range=[0.5, longest + 0.5])
    kinds = {"validation" if h[0].get("validation_top1") is not None else "training" for _, h, _ in curves if h}
    shown = [value for trace in figure.data for value in trace.y]
    figure.update_yaxes(title=f"top-1, {' or '.join(sorted(kinds))} split", tickformat=".0%", **_span(shown))
    return figure


def _span(shares: Sequence[float]) -> dict[str, Any]:
    """An axis for shares, within 0 to 1 and at least two points wide, which Plotly's own choice may not be."""
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    space = max(0.01, 0.08 * (high - low))
    return {"range": [max(-0.002, low - space), min(1.002, high + space)]}


def _plot(figure: go.Figure, name: str, height: int | None) -> str:
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 16, "t": 12, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
        **({"height": height} if height else {}),
    )
    pixels = int(figure.layout.height)
    content = json.dumps(figure.to_plotly_json(), default=list).replace("</", "<\\/")
    return (
        f'<div class="plot" id="{name}" style="height:{pixels}px" role="img" aria-label="{html.escape(name)}"></div>'
        f'<script type="application/json" data-plot="{name}">{content}</script>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --text: #1c2530; --soft: #5b6775; --line: #dde3ea; --back: #ffffff; --band: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6eaf0; --soft: #9aa6b5; --line: #313a46; --back: #12161c; --band: #1a2029; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.facts, .note, section > p { color: var(--soft); margin: .3rem 0; }
.note { font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
@media (max-width: 600px) {
  .scroll::before { content: "more to the right →"; color: var(--soft); font-size: .8rem; }
  th, td { padding: .4rem .45rem; }
}
thead th { color: var(--soft); font-weight: 500; border-bottom-width: 2px; }
td small { display: block; color: var(--soft); min-height: 1.2em; }
.plot { width: 100%; }
@media print { section { break-inside: avoid; } body { max-width: none; } }
</style>
</head>
<body>
<h1>{{title}}</h1>
<p class="facts">{{facts}}</p>
{{body}}
<script>{{plotly}}</script>
<script>
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  const narrow = window.innerWidth < 600;
  for (const source of document.querySelectorAll("script[data-plot]")) {
    const plot = JSON.parse(source.textContent);
    const layout = plot.layout;
    layout.font.color = text;
    layout.hoverlabel = { ...layout.hoverlabel, font: { color: text },
      bgcolor: style.getPropertyValue("--band").trim() };
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = { ...layout[axis], gridcolor: line, zerolinecolor: line, linecolor: line };
      if (narrow && layout[axis].tickfont) layout[axis].tickfont.size = 9;
    }
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text };
    if (narrow) layout.margin = { ...layout.margin, r: 4 };
    Plotly.react(source.dataset.plot, plot.data, layout, { responsive: true, displaylogo: false,
      displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
  }
}
paint();
dark.addEventListener("change", paint);
</script>
</body>
</html>
"""
