"""Durations and sizes as people read them, on the terminal and in the gallery."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Such as "45.2 s", "1 min 30 s" and "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(num_bytes: float) -> str:
    """Such as "12 B" and "1.2 GB", in powers of 1000."""
    power = min(4, max(0, int(math.log10(max(1.0, num_bytes)) // 3)))
    value = f"{num_bytes:,.0f}" if not power else f"{num_bytes / 1000**power:,.1f}"
    return f"{value} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
