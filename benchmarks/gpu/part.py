"""A part of the measurement, its card while it is filled, and the run of several parts within a budget."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from benchmarks.gpu.budget import Budget, OutOfTime
from benchmarks.gpu.random_model import Cost, RandomModel

Status = Literal["measured", "wrong", "failed", "not measured", "skipped", "stopped"]
"""wrong: measured, and something is not as promised. failed: an error. not measured: this machine cannot.
skipped: not enough time was left. stopped: the time ended, and the card has what was found until then."""

BAD: Final = ("wrong", "failed")


class NotMeasurable(Exception):
    """This machine cannot measure the part, with the reason."""


@dataclass
class PartCard:
    """The findings of a part so far."""

    numbers: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """For people."""
    problems: list[str] = field(default_factory=list)
    """Sentences on what is not as promised."""


Measure = Callable[[RandomModel, PartCard, Budget], None]
"""Fills the card. Raises NotMeasurable where this machine cannot measure it."""


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    name: str
    title: str
    cost: Cost
    measure: Measure


@dataclass(frozen=True)
class Outcome:
    """The end of a part."""

    part: Part
    status: Status
    card: PartCard
    seconds: float = 0.0
    reason: str = ""
    """Of a part that is not measured, skipped or stopped; the traceback of one that failed."""

    @property
    def has_card(self) -> bool:
        """Whether there is anything to write: a part that was skipped leaves an earlier card as it is."""
        return self.status != "skipped" and (self.status != "stopped" or bool(self.card.numbers))


def run_parts(
    parts: Sequence[Part],
    model: RandomModel,
    budget: Budget,
    *,
    done: Callable[[Outcome], None] = lambda outcome: None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """The outcomes of the parts, in order. `done` gets each at once, `report` lines on each."""
    outcomes = []
    for part in parts:
        needed = model.expected_s(part.cost)
        if needed > budget.left_s:
            reason = f"it takes about {needed:.0f} s, and {budget.left_s:.0f} s are left"
            outcome = Outcome(part, "skipped", PartCard(), reason=reason)
        else:
            report(f"{part.name}: {part.title}, about {needed:.0f} s of the {budget.left_s:.0f} s left")
            outcome = _run(part, model, budget)
            model.free()
        outcomes.append(outcome)
        report(f"{part.name}: {outcome.status}, {outcome.seconds:.1f} s{_because(outcome)}")
        done(outcome)
    return outcomes


def _run(part: Part, model: RandomModel, budget: Budget) -> Outcome:
    card, started = PartCard(), budget.spent_s
    status: Status
    reason = ""
    try:
        with budget.enforced():
            part.measure(model, card, budget)
        status = "wrong" if card.problems else "measured"
    except NotMeasurable as cannot:
        status, reason = "not measured", str(cannot)
    except OutOfTime:
        status, reason = "stopped", "the time ended"
    except Exception:  # noqa: BLE001 - the other parts go on, and the error stands in the part's card
        status, reason = "failed", traceback.format_exc().strip()
    return Outcome(part, status, card, budget.spent_s - started, reason)


def _because(outcome: Outcome) -> str:
    return f": {outcome.reason.splitlines()[-1]}" if outcome.reason else ""
