"""One catalogue under random faults, until it is complete, and what has to be true of it then."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from pia_ray import ledger, read_results, storage
from pia_ray.config.model import ModelConfig
from pia_ray.errors import row_errors
from tests.chaos import faulty_store
from tests.chaos.ground import Driver, Ground
from tests.chaos.rows import SUCCEEDS, make_rows
from tests.chaos.watch import Watch
from tests.processes import alive, children
from tests.videos import decode_frames

DEMO: Final = ModelConfig.named("demo").model_copy(update={"long_edge": 64})
FRAMES: Final = 4
STEPS: Final = 8
PATIENCE_S: Final = 10.0
DRIVER_S: Final = 900.0
"""A driver that has not ended after so long hangs."""

STORE_FAULTS: Final[dict[str, Callable[[float], faulty_store.Spell]]] = {
    "lost answers": faulty_store.lost_answers,
    "cut bodies": faulty_store.cut_bodies,
    "throttling": faulty_store.throttling,
    "server errors": faulty_store.server_errors,
    "slow store": faulty_store.slowness,
    "store away": faulty_store.absence,
    "videos denied": faulty_store.denial_of_videos,
    "writes denied": faulty_store.denial,
}


@dataclass
class Ended:
    """What came out of a round."""

    seed: int
    output: str
    num_rows: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    driver_ends: Counter[str] = field(default_factory=Counter)
    generations: int = 0
    again: int = 0
    """Generations of healthy rows beyond one each."""
    workers_ended: int = 0
    in_flight_at_ends: int = 0
    problems: list[str] = field(default_factory=list)


class Round:
    """A catalogue of rows drawn from `seed` in a new output, on the ground's store or small disk.

    `faults` are names in order, or the number of those that are drawn. `plain` leaves clocks right, rows without those
    that take long, and drivers on the ground's cluster.
    """

    def __init__(
        self,
        ground: Ground,
        *,
        seed: int,
        num_rows: int,
        faults: int | Sequence[str],
        on_disk: bool = False,
        plain: bool = False,
    ) -> None:
        self._ground = ground
        self._random = random.Random(seed)
        self._plain = plain
        self._on_disk = on_disk and ground.disk is not None
        self._folder = ground.folder / f"round-{seed}"
        with_fifo = not plain and self._random.random() < 0.3
        self._rows = make_rows(
            self._folder / "in", self._random, num=num_rows, with_fifo=with_fifo, rare=0.0 if plain else 0.35
        )
        (self._folder / "marks").mkdir()
        if self._on_disk:
            assert ground.disk is not None
            self._output = str(ground.disk / f"out-{seed}")
        else:
            self._output = f"s3://{ground.server.new_bucket()}/out"
        self._faults = self._draw(faults) if isinstance(faults, int) else list(faults)
        self.ended = Ended(seed, "disk" if self._on_disk else "s3", len(self._rows.ends))
        self._watch = Watch(self._folder / "generations", self._committed)
        self._settings: dict[str, Any] = {
            "manifest": str(self._rows.manifest),
            "output": self._output,
            "model": DEMO.model_dump(mode="json"),
            "defaults": {"num_frames": FRAMES, "num_inference_steps": STEPS},
            "actors": [2, 2],
            "batch_size": 2,
            "prefetch": 2,
            "gpus_per_actor": 0,
            "patience_s": PATIENCE_S,
            "row_timeout_s": 30,
            "hang_timeout_s": 15,
            "fetch_timeout_s": 15 if with_fifo else 300,
            "seconds_per_step": 0.04,
        }
        self._excuses: set[int] = set()
        """Exit codes that what was done to the driver at work explains."""
        self._own_cluster = False
        self._begun_before = 0
        self._last_code = -1

    def play(self) -> Ended:
        """Runs drivers until the catalogue is complete, then checks it."""
        began = time.monotonic()
        try:
            while self._faults or not self._is_complete():
                self._run_driver()
                if self._is_complete() or time.monotonic() - began > 4 * DRIVER_S:
                    break
            self._ground.store.calm()
            self._ground.clear_disk()
            self._finish()
        finally:
            self._watch.close()
        self._check()
        self.ended.seconds = round(time.monotonic() - began, 1)
        return self.ended

    # Drivers

    def _start(self, *, own_cluster: bool) -> Driver:
        clock = 0 if self._plain else self._random.choice((0, 0, 0, 2, -2))
        if clock:
            self.ended.faults[f"driver's clock {clock:+d} h"] += 1
        settings = self._settings if own_cluster else {**self._settings, "address": self._ground.head.address}
        return self._ground.start_driver(
            settings,
            log=self._folder / "generations",
            marks=self._folder / "marks",
            said=self._folder / "drivers.log",
            clock=clock,
        )

    def _run_driver(self) -> None:
        self._own_cluster = not self._plain and self._random.random() < 0.25
        # What is still the matter with the store when the driver starts is its trouble, too.
        self._excuses = {2, 4} if self._ground.store.is_away or self._excuses & {2} else set()
        self._begun_before = len(self._watch.begun)
        driver = self._start(own_cluster=self._own_cluster)
        while driver.runs:
            time.sleep(self._random.uniform(0.3, 1.0 if self._plain else 5.0))
            if self._faults and driver.runs and self._watch.begun:
                self._do_something(driver, self._faults.pop(0))
            if time.monotonic() - driver.began > DRIVER_S:
                self._problem(f"a driver has not ended after {DRIVER_S:g} s")
                driver.process.kill()
        self._note_end(driver)

    @property
    def _is_starting(self) -> bool:
        """Whether the driver at work has begun no row yet: a store that has never answered it, it does not wait for."""
        return len(self._watch.begun) == self._begun_before

    def _note_end(self, driver: Driver) -> None:
        answer = driver.answer()
        code = answer["exit_code"]
        self.ended.driver_ends[f"{code}{' ' + answer['error'] if 'error' in answer else ''}"] += 1
        if code not in {0, 1} | self._excuses:
            self._problem(f"a driver ended with {answer}, which nothing that was done to it explains")
        self._last_code = code
        deadline = time.monotonic() + 60
        while (left := [pid for pid in self._watch.living if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            self._problem(f"workers {left} outlive their driver")

    def _is_complete(self) -> bool:
        return self._last_code in (0, 1)

    def _finish(self) -> None:
        """Runs the same command until it finds nothing that it has not to try again each time."""
        world = {code for code, kind in row_errors().items() if kind.fault == "world"}
        tried_again = sum(code in world for code in self._rows.ends.values())
        for _ in range(3):
            self._excuses = set()
            driver = self._start(own_cluster=False)
            answer = driver.answer()
            self._note_end(driver)
            if answer.get("pending", tried_again + 1) <= tried_again:
                return
        self._problem(f"the same command does not come to an end: {answer}")

    # Faults

    def _do_something(self, driver: Driver, name: str) -> None:
        self.ended.faults[name] += 1
        if name in STORE_FAULTS:
            self._spoil_store(name)
        else:
            getattr(self, "_" + name.replace(" ", "_"))(driver)

    def _draw(self, num: int) -> list[str]:
        names = ["kill worker"] * 6 + ["kill driver"] * 3
        names += ["stop driver", "kill raylet", "freeze worker", "damage part", "delete lease", "second driver"]
        if self._on_disk:
            names += ["full disk"] * 4
        else:
            names += [*STORE_FAULTS, "freeze store", "store away"]
        return self._random.choices(names, k=num)

    def _spoil_store(self, name: str) -> None:
        seconds = 2.0 if self._plain else self._random.choice((2.0, 5.0, 5.0, 18.0))
        if name == "store away":
            self._excuses |= {4} if seconds > PATIENCE_S / 2 or self._is_starting else set()
        elif "denied" in name:
            self._excuses |= {2}
        elif self._is_starting or (name in ("throttling", "server errors") and seconds > PATIENCE_S):
            self._excuses |= {4}
        self._ground.store.begin(STORE_FAULTS[name](seconds))

    def _kill_worker(self, driver: Driver) -> None:
        if living := self._watch.living:
            _send(self._random.choice(living), signal.SIGKILL)

    def _freeze_worker(self, driver: Driver) -> None:
        if living := self._watch.living:
            pid = self._random.choice(living)
            _send(pid, signal.SIGSTOP)
            time.sleep(3)
            _send(pid, signal.SIGCONT)

    def _kill_driver(self, driver: Driver) -> None:
        driver.process.kill()
        self._excuses |= {-signal.SIGKILL}

    def _stop_driver(self, driver: Driver) -> None:
        driver.process.terminate()
        self._excuses |= {130, -signal.SIGTERM}

    def _kill_raylet(self, driver: Driver) -> None:
        raylets = [pid for pid, command in children(driver.process.pid).items() if "raylet/raylet" in command]
        if not self._own_cluster:  # its raylet is everybody's
            self._kill_driver(driver)
        for pid in raylets:
            _send(pid, signal.SIGKILL)
            self._excuses |= {2, 1, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGTERM, 130}

    def _second_driver(self, driver: Driver) -> None:
        self._excuses |= {2} if self._is_starting else set()  # the second one may be the first to take the lease
        second = self._start(own_cluster=False)
        answer = second.answer()
        if answer.get("error") != "lease_held" and driver.runs and answer["exit_code"] not in self._excuses:
            self._problem(f"a second driver was let in: {answer}")
        elif answer["exit_code"] in (0, 1):
            self._last_code = answer["exit_code"]

    def _freeze_store(self, driver: Driver) -> None:
        self._ground.freeze_store(4)

    def _full_disk(self, driver: Driver) -> None:
        seconds = self._random.choice((2, 4, 15))
        self._excuses |= {4} if seconds > PATIENCE_S / 2 or self._is_starting else set()
        self._ground.fill_disk()
        time.sleep(seconds)
        self._ground.clear_disk()

    def _delete_lease(self, driver: Driver) -> None:
        storage.delete(storage.join(self._output, "_ledger", "lease.json"))

    def _damage_part(self, driver: Driver) -> None:
        parts = list(storage.list_objects(storage.join(self._output, "_ledger", "parts"), suffix=".parquet"))
        if parts:
            uri = self._random.choice(parts).uri
            content = storage.read_bytes(uri)
            damages = (b"", content[: len(content) // 2], b"\0" * len(content), content[:-20] + b"\xff" * 20)
            storage.write_bytes(uri, self._random.choice(damages))

    # What has to be true

    def _committed(self) -> dict[str, str]:
        """Identities of the videos that are there, by row."""
        found = {}
        for each in storage.list_objects(storage.join(self._output, "videos"), suffix=".mp4"):
            name = each.uri.rpartition("/")[2]
            row = re.sub(r"-[0-9a-f]{16}\.mp4$", "", name)
            found[row] = f"{each.etag} {each.last_modified}"
        return found

    def _check(self) -> None:
        ended, watch, rows = self.ended, self._watch, self._rows
        results = read_results(self._output).to_pylist()
        found = Counter(row["id"] for row in results)
        if found != Counter(rows.ends.keys()):
            self._problem(f"items in are not results out: {set(rows.ends) ^ set(found)} {found.most_common(3)}")
        for row in results:
            self._check_result(row)
        ended.problems += watch.problems
        if redone := watch.redone():
            self._problem(f"committed rows were begun again: {redone}")
        times, hits = watch.times, watch.hits
        for row in rows.healthy:
            if times[row] > 1 + hits[row]:
                self._problem(f"{row}: {times[row]} generations, and {hits[row]} ends of its process")
        ended.generations, ended.workers_ended = times.total(), watch.num_ended
        ended.again = sum(max(0, times[row] - 1) for row in rows.healthy)
        ended.in_flight_at_ends = sum(hits[row] for row in rows.healthy)
        if left := ledger.count_attempts(self._output):
            self._problem(f"attempt records are left: {left}")
        verified = ledger.verify(self._output, deep=True)
        if not verified.ok or verified.num_orphans or verified.num_missing_thumbnails:
            self._problem(f"verify: {verified}")
        if left_files := self._ground.leftovers():
            self._problem(f"temporary files are left: {left_files[:5]}")

    def _check_result(self, row: dict[str, Any]) -> None:
        code, expected = row["error_code"] or SUCCEEDS, self._rows.ends.get(row["id"])
        # A row that our own kills have hit so often cannot be told from one that kills its workers.
        if code == "worker_died" and self._watch.hits[row["id"]] >= 3:
            return
        if code != expected:
            self._problem(f"{row['id']} ended as {code!r}, not {expected!r}: {row['error_message']}")
        if row["video_uri"]:
            content = storage.read_bytes(row["video_uri"])
            if hashlib.sha256(content).hexdigest() != row["sha256"] or len(decode_frames(content)) != FRAMES:
                self._problem(f"{row['id']}: the video is not what its row says")

    def _problem(self, text: str) -> None:
        self.ended.problems.append(text)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
