"""Ranges of settings."""

from __future__ import annotations

from collections.abc import Mapping

from cascade_rt.errors import InvalidOption


def check_ranges(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise InvalidOption for an attribute that is out of its range; None is in every range."""
    for name, (lowest, highest) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not lowest <= value <= highest:
            raise InvalidOption(name, value, f"a number from {lowest:g} to {highest:g}")
