"""The results page: one self-contained HTML file that needs neither network nor server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from scop.report.page.content import content
from scop.report.paired_comparison import compare_pairs
from scop.report.results import Result
from scop.storage.manifest import write_atomically
from scop.system.cost import Spent

_HERE = Path(__file__).parent
_PAIRS = 40


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
        from plotly.offline import get_plotlyjs

        environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        # JSON has no NaN or infinity (the loss of a diverged training): they become null. Within a script element,
        # "<" could start the end tag or a comment.
        data = to_json(content(self.results, self.details), inf_nan_mode="null").decode().replace("<", "\\u003c")
        return environment.get_template("page.html").render(
            title=self.title,
            facts=self._facts(),
            missing=self.missing,
            spent=self.spent,
            pairs=[str(pair) for pair in compare_pairs(self.results)[:_PAIRS]],
            css=_file("page.css"),
            script=_file("page.js"),
            plotly=get_plotlyjs(),
            tabulator=_file("vendor/tabulator.min.js"),
            tabulator_css=_file("vendor/tabulator_simple.min.css"),
            tabulator_license=_file("vendor/LICENSE"),
            data=data,
        )

    def _facts(self) -> list[str]:
        facts = list(self.facts)
        devices = sorted({result.device for result in self.results})
        names = sorted({f"{result.params.get('dataset', 'unknown data')}" for result in self.results})
        facts.append(f"{', '.join(names)}. Latency measured on {', '.join(devices)}.")
        return facts


def _file(name: str) -> str:
    """Return a file of this package, without the comment that names a source map, which the page does not contain."""
    text = (_HERE / name).read_text(encoding="utf-8")
    return re.sub(r"(//|/\*)# sourceMappingURL=.*", "", text)
