"""Number formatting for display."""

from __future__ import annotations


def human(value: float, unit: str = "") -> str:
    """Format a number with three significant digits and a metric prefix: 272 k, 40.8 M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
