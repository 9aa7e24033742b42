from __future__ import annotations

import pytest

from pia_ray.formatting import count_of, duration, first_line, size, videos_rate


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (count_of(0, "row"), "0 rows"),
        (count_of(1, "row"), "1 row"),
        (count_of(1200, "work item"), "1,200 work items"),
        (duration(0), "0.0 s"),
        (duration(0.0004), "0.4 ms"),
        (duration(0.0849), "85 ms"),
        (duration(0.1), "0.1 s"),
        (duration(95), "1 min 35 s"),
        (duration(7500), "2 h 05 min"),
        (videos_rate(0.1), "6.0 videos/min"),
        (videos_rate(0.01), "36.0 videos/h"),
        (size(12), "12 B"),
        (size(25_902), "25.9 kB"),
        (first_line(ValueError("\n one\ntwo")), "one"),
        (first_line(TimeoutError()), "TimeoutError"),
    ],
)
def test_counts_durations_sizes_and_errors_are_written_for_people(told: str, expected: str) -> None:
    assert told == expected
