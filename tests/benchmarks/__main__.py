"""`make bench`: run the speed benchmarks, print a table, and write JSON with machine and versions.

Names select benchmarks: ``make bench ARGS="batches finetuning"``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.benchmarks.bounds import figures
from tests.benchmarks.measure import RESULTS, machine
from tests.benchmarks.speed import BENCHMARKS


def main(names: list[str]) -> int:
    """Run benchmarks by name, all by default. Return 1 if one misses its bound, 2 if a name is unknown."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r} (known: {', '.join(BENCHMARKS)})", file=sys.stderr)
        return 2
    path = RESULTS / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    missed = 0
    for name in names or BENCHMARKS:
        run, turns = BENCHMARKS[name]
        results[name] = {**run(turns), "machine": machine(), "command": f"make bench ARGS={name}"}
        for label, figure in figures({name: results[name]}).items():
            missed += not figure.met
            mark = "" if figure.met else "MISSED"
            print(f"{label:24} {figure.value:8.3f}   {figure.limit} {figure.bound:<6} {mark}", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
