"""The takes of a row or request: its policy, the seed of each take, their order, and the take to make next.

A row is animated with its own seed first, which is take 0. Where the video misses a bound, it is animated again with
the seed of take 1, and so on. The same row and policy lead to the same take, wherever and whenever it is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from pia_ray.config.acceptance import Bound
from pia_ray.config.resolving import canonical
from pia_ray.errors import NotAccepted
from pia_ray.formatting import count_of
from pia_ray.result_row import APPROVED, JUDGED, REJECTED, ResultRow

_FACTS: Final = ("take", "seed", "gpu_s", "run_id", "error", "review")

PASSED_OVER: Final = "passed_over"
"""The verdict on the takes that were not published when the row's video was rejected."""

_OUT: Final = frozenset({REJECTED, PASSED_OVER})


@dataclass(frozen=True)
class Policy:
    """The bounds of a row's video, and the takes that may be tried for them."""

    bounds: tuple[Bound, ...] = ()
    retakes: int = 0
    unaccepted: Literal["keep", "fail"] = "keep"

    def accepts(self, scores: Mapping[str, Any]) -> bool:
        """Whether these numbers meet every bound; one that was not measured meets all."""
        return not self.violation(scores)

    def violation(self, scores: Mapping[str, Any]) -> float:
        """The sum of the bounds' shortfalls, each as a share of its bound; 0 where all are met."""
        return sum(bound.shortfall(scores.get(bound.number)) for bound in self.bounds)


NO_POLICY: Final = Policy()
"""Any video is accepted, and none is animated again."""


@dataclass(frozen=True)
class Take:
    """One animation of a row."""

    number: int
    seed: int
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """The numbers of its video by name."""
    gpu_s: float | None = None
    run_id: str | None = None
    """The run that made it."""
    error: str | None = None
    """Error code of a take without a video."""
    review: str | None = None
    """A person's verdict: `approved`, `rejected` or PASSED_OVER."""

    @property
    def is_out(self) -> bool:
        """Whether a person has rejected it, or the row's video after it was tried."""
        return self.review in _OUT


def take_seed(seed: int, number: int) -> int:
    """The seed of a take: the row's own for take 0, else the first eight bytes of sha256 of `<seed>/take/<number>`."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/take/{number}".encode()).digest()[:8], "big")


def best_take(takes: Iterable[Take], policy: Policy) -> Take | None:
    """The best of the takes: an approved one, then an accepted one, the one of least violation, and the earliest.

    None where no take has a video, or all are rejected.
    """
    return min(
        (take for take in takes if take.error is None and not take.is_out),
        key=lambda take: (take.review != APPROVED, policy.violation(take.scores), take.number),
        default=None,
    )


def is_good(take: Take, policy: Policy) -> bool:
    """Whether no other take is tried after it: a person has approved it, or it meets the bounds and is not rejected."""
    return take.review == APPROVED or (not take.is_out and policy.accepts(take.scores))


def next_take(
    takes: Sequence[Take], policy: Policy, *, published: int | None, made: Collection[int] = frozenset()
) -> int | None:
    """The number of the take to make now; None where the row has its video, or is given up.

    `published` is the number of the take whose video is there; `made` are those of this stay in a worker, which are
    not made again. A take that was tried is made again only where it is the best and its video is not there.
    After a rejection as many takes may be tried as at first.
    """
    best = best_take(takes, policy)
    shown = next((take for take in takes if take.number == published and take.error is None), None)
    if shown is not None and is_good(shown, policy):
        return None
    again = best.number if best is not None and best.number != published and best.number not in made else None
    if best is not None and again is not None and is_good(best, policy):
        return again
    tried = max((take.number for take in takes), default=-1)
    first = 1 + max((take.number for take in takes if take.is_out), default=-1)
    if tried < first + policy.retakes:
        return tried + 1
    return again if policy.unaccepted == "keep" else None


def merged(*several: Iterable[Take]) -> tuple[Take, ...]:
    """The takes by number; of two with one number the later one given, with the verdict of either."""
    found: dict[int, Take] = {}
    for take in (take for takes in several for take in takes):
        known = found.get(take.number)
        keeps = known is not None and (known.is_out or take.review is None)
        found[take.number] = replace(take, review=known.review) if known is not None and keeps else take
    return tuple(found[number] for number in sorted(found))


def not_accepted(takes: Sequence[Take], policy: Policy) -> NotAccepted:
    """The error of a row of which no take is accepted: its bounds, and the numbers of the best take."""
    best = best_take(takes, policy)
    bounds = ", ".join(map(str, policy.bounds))
    found = {} if best is None else {bound.number: best.scores.get(bound.number) for bound in policy.bounds}
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None)
    return NotAccepted(f"of {count_of(len(takes), 'take')} none meets {bounds}; the best has {numbers or 'no video'}")


def take_of(row: ResultRow, number: int) -> Take:
    """The take whose video a result row describes."""
    scores = {name: getattr(row, name) for name in JUDGED}
    return Take(number, row.seed, scores, gpu_s=row.gpu_s, run_id=row.run_id)


def takes_of(row: ResultRow) -> tuple[Take, ...]:
    """The takes that a result row tells of; the row of a run without bounds is take 0."""
    if row.takes is not None:
        return takes_from_json(row.takes)
    return (take_of(row, row.take or 0),) if row.status == "succeeded" else ()


def takes_to_json(takes: Iterable[Take]) -> str:
    """The cell `takes`: a list with the number, seed, numbers, engine seconds and run of each take."""
    return canonical(plain_takes(takes))


def plain_takes(takes: Iterable[Take]) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [_plain(take) for take in takes]


def takes_from_json(text: str | None) -> tuple[Take, ...]:
    """The takes of such a cell; none where it is null or not one of ours."""
    try:
        values = json.loads(text or "[]")
        return tuple(
            Take(
                int(value["take"]),
                int(value["seed"]),
                {name: score for name, score in value.items() if name not in _FACTS},
                gpu_s=value.get("gpu_s"),
                run_id=value.get("run_id"),
                error=value.get("error"),
                review=value.get("review"),
            )
            for value in values
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def _plain(take: Take) -> dict[str, Any]:
    facts = {"take": take.number, "seed": str(take.seed), "gpu_s": take.gpu_s, "run_id": take.run_id}
    facts |= {"error": take.error, "review": take.review}
    scores = {name: score for name, score in take.scores.items() if score is not None and math.isfinite(score)}
    return {name: value for name, value in facts.items() if value is not None} | scores


def with_verdict(row: ResultRow, takes: Sequence[Take], policy: Policy, *, number: int) -> ResultRow:
    """The result row of a take's video, with the columns `accepted`, `take` and `takes`, and `review` and its take."""
    accepted = policy.accepts({name: getattr(row, name) for name in JUDGED}) if policy.bounds else None
    reviewed = last_reviewed(takes)
    return replace(
        row,
        accepted=accepted,
        take=number,
        takes=takes_to_json(takes),
        review=None if reviewed is None else reviewed.review,
        review_take=None if reviewed is None else reviewed.number,
    )


def last_reviewed(takes: Iterable[Take]) -> Take | None:
    """The take that a person's last verdict is about; None without one."""
    seen = (take for take in takes if take.review in (APPROVED, REJECTED))
    return max(seen, key=lambda take: take.number, default=None)


def with_review(takes: Iterable[Take], review: str, *, number: int) -> tuple[Take, ...]:
    """The takes after a verdict on the one of that number, which is published."""

    def reviewed(take: Take) -> Take:
        if take.number == number:
            return replace(take, review=review)
        return replace(take, review=take.review or PASSED_OVER) if review == REJECTED else take

    return tuple(map(reviewed, takes))
