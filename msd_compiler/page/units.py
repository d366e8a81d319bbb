"""Figures as the page writes them."""

from __future__ import annotations

from ..screen import time_text


def clock(seconds: float | None) -> str:
    """``12.3 µs``."""
    return "–" if seconds is None else time_text(seconds).replace("us", "µs").replace(" ", "\N{NO-BREAK SPACE}")


def distance(value: float | None) -> str:
    """``1.7e-4``."""
    if not value:
        return "–" if value is None else "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def amount(size: float | None) -> str:
    """``11.3 kB``."""
    if size is None:
        return "–"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{size:.0f}\N{NO-BREAK SPACE}B"
