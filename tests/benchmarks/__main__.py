"""`make bench`: run the speed benchmarks, print a table, and write JSON with machine and versions.

Names select benchmarks: ``make bench ARGS="batches finetuning"``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import machine
from tests.benchmarks.speed import BENCHMARKS

RESULTS = Path(__file__).parent / "results" / "speed.json"


def main(names: list[str]) -> int:
    """Run benchmarks by name, all by default. Return 1 if one misses its bound, 2 if a name is unknown."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r} (known: {', '.join(BENCHMARKS)})", file=sys.stderr)
        return 2
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missed = 0
    for name in names or BENCHMARKS:
        run, turns = BENCHMARKS[name]
        results[name] = {**run(turns), "machine": machine(), "command": f"make bench ARGS={name}"}
        for label, value, bound, met in _figures(name, results[name]):
            missed += not met
            print(f"{label:24} {value:8.3f}   {bound:14} {'' if met else 'MISSED'}", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if missed else 0


def _figures(name: str, result: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Return (label, figure, bound, whether it is met) for each figure of a benchmark."""
    if "at_most" in result or "at_least" in result:
        value = float(result["ratio"] if "ratio" in result else result["seconds"])
        if "at_most" in result:
            return [(name, value, f"at most {result['at_most']}", value <= float(result["at_most"]))]
        return [(name, value, f"at least {result['at_least']}", value >= float(result["at_least"]))]
    parts = ((key, part) for key, part in result.items() if isinstance(part, dict))
    return [figure for key, part in parts for figure in _figures(f"{name} {key}", part)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
