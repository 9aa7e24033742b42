from __future__ import annotations

import pytest

from pia_ray.catalog.actors.start_reports import start_in_words
from pia_ray.weights.hub_requests import CountedBar
from pia_ray.weights.transfers import TRANSFERS


@pytest.mark.parametrize(
    ("reports", "rate", "words"),
    [
        ([], 0.0, ""),
        ([["imports", 0, 0]], 0.0, "torch is imported on 1 of 1 worker"),
        ([["denoises", 0, 0], ["imports", 0, 0], ["loads", 0, 0]], 0.0, "torch is imported on 1 of 3 workers"),
        ([["loads", 0, 0], ["loads", 0, 0]], 0.0, "the model loads on 2 of 2 workers"),
        ([["loads", 0, 0], ["denoises", 0, 0], ["denoises", 3, 25]], 0.0, "the model loads on 1 of 3 workers"),
        (
            [["loads", 0, 0], ["fetches", 1_200_000_000, 3_100_000_000], ["fetches", 5, 3_100_000_000]],
            40e6,
            "weights are fetched, 1.2 GB of 3.1 GB, 40.0 MB/s",
        ),
        ([["fetches", 0, 3_100_000_000]], 0.0, "weights are fetched, 0 B of 3.1 GB"),
        ([["denoises", 0, 0, 2.9, 0.4]], 0.0, "the first rows are fetched"),
        ([["denoises", 1, 25], ["denoises", 3, 25]], 0.0, "the first row denoises, step 3 of 25"),
    ],
)
def test_the_start_of_workers_is_said_by_the_one_that_is_behind(
    reports: list[list[object]], rate: float, words: str
) -> None:
    assert start_in_words(reports, bytes_per_s=rate) == words


def test_bytes_from_the_hub_are_counted_once_whether_the_bar_is_shown_or_not() -> None:
    done, total = TRANSFERS.bytes
    name = "huggingface_hub.snapshot_download"
    with (
        CountedBar(total=0, unit="B", disable=True, name=f"{name}.transfer") as network,
        CountedBar(total=0, unit="B", disable=True, name=name) as files,
        CountedBar(total=7, unit="it", disable=True) as number,
    ):
        for bar in (network, files):
            bar.total += 1000  # as huggingface_hub does for each file
            bar.update(300)
        number.update(2)
        assert TRANSFERS.bytes == (done + 300, total + 1000)
        files.update(700)
    assert TRANSFERS.bytes == (done + 1000, total + 1000)
