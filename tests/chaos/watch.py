"""Watches a run from outside: what its animators begin, what is committed, and which of their processes end."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.processes import alive

LOOK_S = 0.3


class Watch:
    """A thread that looks again and again at the generation log and at the videos that are there.

    `committed` gives the videos by row id, each with an identity that changes if the video is written again.
    """

    def __init__(self, log: Path, committed: Callable[[], Mapping[str, str]]) -> None:
        self._log = log
        self._list = committed
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._living: set[int] = set()
        self._dead: set[int] = set()
        self.begun: list[tuple[str, int]] = []
        """Row id and process of each generation so far."""
        self.committed: dict[str, tuple[int, str]] = {}
        """Of each row whose video was seen: the number of generations that had begun then, and the video's identity."""
        self.hits: Counter[str] = Counter()
        """The times that a row was in a process that ended, begun and not committed."""
        self.problems: list[str] = []
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def living(self) -> list[int]:
        """Processes that animate and have not ended."""
        with self._lock:
            return sorted(self._living)

    @property
    def num_ended(self) -> int:
        """Processes that animated and have ended."""
        return len(self._dead)

    @property
    def times(self) -> Counter[str]:
        """Generations by row id."""
        return Counter(row for row, _ in self.begun)

    def close(self) -> None:
        """Looks once more, then no longer."""
        self._ended.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Takes in what is there now."""
        with self._lock:
            self._read()
            ended = {pid for pid in self._living if not alive(pid)}
            self._read()  # what they wrote last
            present = self._list()
            for row, identity in present.items():
                known = self.committed.setdefault(row, (len(self.begun), identity))
                if known[1] != identity:
                    self.problems.append(f"the committed video of {row} was written again")
                    self.committed[row] = (known[0], identity)
            for pid in ended:
                self.hits.update({row for row, by in self.begun if by == pid and row not in present})
            self._living -= ended
            self._dead |= ended

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except Exception:
                continue

    def _read(self) -> None:
        if not self._log.exists():
            return
        lines = self._log.read_text().splitlines()
        for line in lines[len(self.begun) :]:
            entry = json.loads(line)
            self.begun.append((entry["id"], entry["pid"]))
            if entry["pid"] not in self._dead:
                self._living.add(entry["pid"])

    def redone(self) -> list[str]:
        """Rows that were begun again after their video was there."""
        return sorted({row for number, (row, _) in enumerate(self.begun) if self._is_redone(row, number)})

    def _is_redone(self, row: str, number: int) -> bool:
        return row in self.committed and number >= self.committed[row][0]
