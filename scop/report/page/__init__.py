"""The results page: one self-contained HTML file that needs neither network nor server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.paired_comparison import compare_pairs
from scop.report.plots import comparable
from scop.report.results import Result
from scop.storage.manifest import write_atomically
from scop.system.cost import Spent

_HERE = Path(__file__).parent
_BINS = 50
_PAIRS = 40
# Entries of an evaluation that the plots of a single network show.
DETAILS = ("kept", "channels", "unsure", "history", "dense_history", "confusion", "classes")
_COLUMNS = ("pruned_top1", "top1_drop", "pruned_macs", "pruned_params", "pruned_bytes")
# Parameters that get a column if they differ between results.
_LABELS = (
    "network",
    "method",
    "prune_rate",
    "residual",
    "round_to",
    "finetune_epochs",
    "finetune_lr",
    "trained_on",
    "seed",
)


@dataclass(frozen=True)
class Page:
    """Content of the results page.

    Attributes:
        title: heading of the page.
        results: results to show; at least one.
        details: index in `results` -> evaluation, for some of the results. Each evaluation also has its run's
            ``scores``: layer -> scores of its channels, empty if there are none.
        missing: name -> reason, for variants or runs without a result.
        facts: lines below the heading.
        spent: compute time and energy used.
    """

    title: str
    results: Sequence[Result]
    details: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[str] = ()
    spent: Sequence[Spent] = ()

    def write(self, path: Path) -> None:
        """Write the page.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(path, self.render())

    def render(self) -> str:
        """Return the page as HTML."""
        from jinja2 import Environment, FileSystemLoader
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs

        environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        # JSON has no NaN or infinity (the loss of a diverged training): they become null. Within a script element,
        # "<" could start the end tag or a comment.
        data = to_json(self._data(), inf_nan_mode="null").decode().replace("<", "\\u003c")
        return environment.get_template("page.html").render(
            title=self.title,
            facts=self._facts(),
            missing=self.missing,
            spent=self.spent,
            pairs=[str(pair) for pair in compare_pairs(self.results)[:_PAIRS]],
            css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
            plotly=Markup(get_plotlyjs()),
            data=Markup(data),
        )

    def _facts(self) -> list[str]:
        facts = list(self.facts)
        devices = sorted({result.device for result in self.results})
        names = sorted({f"{result.params.get('dataset', 'unknown data')}" for result in self.results})
        facts.append(f"{', '.join(names)}. Latency measured on {', '.join(devices)}.")
        return facts

    def _data(self) -> dict[str, Any]:
        known = {key for result in self.results for key in result.metrics}
        columns = [key for key in (*_COLUMNS, *smallest_batch(known)) if key in known] or sorted(known)[:1]
        latencies = sorted(key for key in known if key.startswith("pruned_latency_ms") and key.endswith("_p50"))
        across: list[str] = [k for k in ("pruned_macs", "pruned_params", "pruned_bytes") if k in known]
        across += [*latencies, *(k for k in ("pruned_train_seconds",) if k in known)]
        up = [k for k in ("pruned_top1", "pruned_top5", "top1_drop", "pruned_loss") if k in known]
        differing = [key for key in _LABELS if len({result.params.get(key) for result in self.results}) > 1]
        return {
            "metrics": [_described(describe(key)) for key in sorted(known)],
            "columns": columns,
            "labels": differing,
            "across": across or columns,
            "up": up or columns,
            "sort": columns[0] if columns else "name",
            "rows": [self._row(number, result) for number, result in enumerate(self.results)],
        }

    def _row(self, number: int, result: Result) -> dict[str, Any]:
        row = asdict(result) | {"identity": result.identity, "rerun": result.rerun, "details": None}
        del row["right"]  # only the paired comparison uses it
        evaluation = self.details.get(number, {})
        if not all(key in evaluation for key in DETAILS):  # written by an earlier version
            return row
        scores = {layer: entry for layer, entry in (evaluation.get("scores") or {}).items() if len(entry)}
        shown = {key: evaluation[key] for key in DETAILS} | {"scores": _histograms(scores) if scores else None}
        return row | {"details": shown}


def _described(metric: Metric) -> dict[str, Any]:
    return {"key": metric.key, "title": metric.title, "kind": metric.kind, "higher": metric.higher_is_better}


def _histograms(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the histogram of the scores of each layer, with the same bins for all layers."""
    shown, title = comparable(scores)
    values = {layer: np.asarray(entry, dtype=float) for layer, entry in shown.items()}
    everything = np.concatenate(list(values.values()))
    edges = np.linspace(min(everything.min(), 0), max(everything.max(), 0) + 1e-9, _BINS + 1)
    return {
        "title": title,
        "layers": list(values),
        "centres": [round(float(centre), 6) for centre in (edges[:-1] + edges[1:]) / 2],
        "counts": [np.histogram(of_layer, edges)[0].tolist() for of_layer in values.values()],
    }
