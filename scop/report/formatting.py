"""Numbers for people."""

from __future__ import annotations


def human(value: float, unit: str = "") -> str:
    """A number with three digits and a metric prefix: 272.3 k, 40.8 M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
