"""Counts, durations, sizes and errors as people read them: in messages, on the terminal and in the gallery."""

from __future__ import annotations

import math


def count_of(number: int, noun: str) -> str:
    """Such as "1 row", "0 rows" and "1,200 rows"; the noun is given in the singular."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Such as "7 ms", "45.2 s", "1 min 30 s" and "2 h 05 min"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.001 else f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def videos_rate(per_s: float) -> str:
    """Such as "6.8 videos/min", and "12.0 videos/h" where there are less than one a minute."""
    return f"{60 * per_s:,.1f} videos/min" if 60 * per_s >= 1 else f"{3600 * per_s:,.1f} videos/h"


def size(num_bytes: float) -> str:
    """Such as "12 B" and "1.2 GB", in powers of 1000."""
    power = min(4, max(0, int(math.log10(max(1.0, num_bytes)) // 3)))
    value = f"{num_bytes:,.0f}" if not power else f"{num_bytes / 1000**power:,.1f}"
    return f"{value} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
