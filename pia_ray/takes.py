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
from pia_ray.result_row import JUDGED, ResultRow

_FACTS: Final = ("take", "seed", "gpu_s", "run_id", "error")


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


def take_seed(seed: int, number: int) -> int:
    """The seed of a take: the row's own for take 0, else the first eight bytes of sha256 of `<seed>/take/<number>`."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/take/{number}".encode()).digest()[:8], "big")


def best_take(takes: Iterable[Take], policy: Policy) -> Take | None:
    """The best of the takes: one that is accepted, then the one of least violation, then the earliest.

    None where no take has a video.
    """
    return min(
        (take for take in takes if take.error is None),
        key=lambda take: (policy.violation(take.scores), take.number),
        default=None,
    )


def next_take(
    takes: Sequence[Take], policy: Policy, *, published: int | None, made: Collection[int] = frozenset()
) -> int | None:
    """The number of the take to make now; None where the row has its video, or is given up.

    `published` is the number of the take whose video is there; `made` are those of this stay in a worker, which are
    not made again. A take that was tried is made again only where it is the best and its video is not there.
    """
    best = best_take(takes, policy)
    shown = next((take for take in takes if take.number == published and take.error is None), None)
    if shown is not None and policy.accepts(shown.scores):
        return None
    again = best.number if best is not None and best.number != published and best.number not in made else None
    if best is not None and again is not None and policy.accepts(best.scores):
        return again
    tried = max((take.number for take in takes), default=-1)
    if tried < policy.retakes:
        return tried + 1
    return again if policy.unaccepted == "keep" else None


def merged(*several: Iterable[Take]) -> tuple[Take, ...]:
    """The takes by number; of two with one number the later one given."""
    found = {take.number: take for takes in several for take in takes}
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
            )
            for value in values
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def _plain(take: Take) -> dict[str, Any]:
    facts = {"take": take.number, "seed": str(take.seed), "gpu_s": take.gpu_s, "run_id": take.run_id}
    facts["error"] = take.error
    scores = {name: score for name, score in take.scores.items() if score is not None and math.isfinite(score)}
    return {name: value for name, value in facts.items() if value is not None} | scores


def with_verdict(row: ResultRow, takes: Sequence[Take], policy: Policy, *, number: int) -> ResultRow:
    """The result row of a take's video, with the columns `accepted`, `take` and `takes`."""
    accepted = policy.accepts({name: getattr(row, name) for name in JUDGED})
    return replace(row, accepted=accepted, take=number, takes=takes_to_json(takes))
