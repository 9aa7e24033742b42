"""Jobs of one priority begin in turn between owners, by weight, and by age within an owner."""

from __future__ import annotations

from datetime import UTC, datetime

from pia_ray.online.documents.document import IndexEntry
from pia_ray.online.video_jobs.fair_shares import FairShares


def entries(*waiting: tuple[str, int, int]) -> list[IndexEntry]:
    """Entries of so many jobs of an owner at a rank, the owners one after the other in age."""
    made = [
        IndexEntry(f"{number:02}-{owner}{job}", rank, owner, datetime.now(UTC), "")
        for number, (owner, rank, num_jobs) in enumerate(waiting)
        for job in range(num_jobs)
    ]
    return sorted(made, key=lambda entry: (entry.rank, entry.id))


def owners(shares: FairShares, queue: list[IndexEntry]) -> str:
    """The owners of a queue as it is worked off, each claim counted."""
    left, found = list(queue), ""
    while left:
        first = next(shares.ordered(left))
        shares.count(first.owner_folder)
        left.remove(first)
        found += first.owner_folder
    return found


def test_owners_take_turns_and_a_later_one_does_not_wait_for_the_queue_of_another() -> None:
    assert owners(FairShares({}), entries(("a", 1, 5), ("b", 1, 2))) == "ababaaa"


def test_within_an_owner_the_oldest_job_is_first() -> None:
    ids = [entry.id for entry in FairShares({}).ordered(entries(("a", 1, 3), ("b", 1, 2))) if entry.owner_folder == "a"]
    assert ids == sorted(ids)


def test_an_owner_of_twice_the_weight_has_twice_the_jobs() -> None:
    assert owners(FairShares({"a": 2.0}), entries(("a", 1, 6), ("b", 1, 3))).count("a", 0, 6) == 4


def test_jobs_of_a_more_urgent_rank_go_first_whosever_they_are() -> None:
    assert owners(FairShares({}), entries(("a", 2, 2), ("b", 2, 1), ("a", 1, 2))) == "aabaa"


def test_an_owner_that_waited_for_nothing_has_saved_nothing_up() -> None:
    shares = FairShares({})
    owners(shares, entries(("a", 1, 50)))
    assert owners(shares, entries(("a", 1, 4), ("b", 1, 4)))[:4].count("b") == 2
