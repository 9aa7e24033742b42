"""Random faults of all kinds from a seed for a given time: `python -m tests.chaos.soak --seconds 600 --seed 1`.

Each round is a catalogue that is animated under fire until it is complete, and is checked then. The last line is the
report as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.ground import Ground
from tests.chaos.round import Ended, Round

NUM_ROWS = 100


@dataclass
class Report:
    """What a soak has done and found."""

    seed: int
    seconds: float = 0.0
    rounds: list[Ended] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts over all rounds."""
        names = ("num_rows", "generations", "again", "workers_ended", "in_flight_at_ends")
        numbers = {name: sum(getattr(each, name) for each in self.rounds) for name in names}
        faults = sum((each.faults for each in self.rounds), Counter[str]())
        ends = sum((each.driver_ends for each in self.rounds), Counter[str]())
        return {"rounds": len(self.rounds), **numbers, "faults": dict(faults), "driver_ends": dict(ends)}


def soak(seed: int, *, seconds: float, say: Callable[[str], None] = print) -> Report:
    """Rounds of faults for about so long; the last one goes to its end."""
    say(f"seed {seed}")
    report, draw = Report(seed), random.Random(seed)
    with Ground(seed=seed) as ground:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            number = seed * 1000 + len(report.rounds)
            faults, on_disk = draw.randint(4, 12), draw.random() < 0.3
            ended = Round(ground, seed=number, num_rows=NUM_ROWS, faults=faults, on_disk=on_disk).play()
            report.rounds.append(ended)
            report.problems += [f"round {number}: {problem}" for problem in ended.problems]
            ground.problems += ended.problems
            say(f"round {number} ({ended.output}): {json.dumps(vars(ended))}")
    report.problems += [f"at the end: {problem}" for problem in ground.problems if problem not in str(report.problems)]
    report.seconds = round(time.monotonic() - began, 1)
    if report.problems:
        say(f"logs are in {ground.folder}")
    return report


def main() -> int:
    """Soaks, and returns 1 where something was not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    report = soak(args.seed, seconds=args.seconds, say=lambda text: print(text, flush=True))
    print("\n".join(report.problems) or "no problems", flush=True)
    totals = {"seed": report.seed, "seconds": report.seconds, **report.totals, "problems": report.problems}
    print(json.dumps(totals), flush=True)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
