"""The kinds of forward that run compiled, chosen by what compiling them gains in the forwards that are left.

A kind runs uncompiled while another thread compiles it. torch 2.13 allows it: its tracing state and its settings are
each thread's own (`torch._dynamo.eval_frame.DynamoTLS`, ContextVars in `torch.utils._config_module`), a lock serialises
compilations (`convert_frame.compile_lock`), and code that one thread compiled is found by all. Two things are the
process's: `torch.compiler.is_compiling()` is true in all threads meanwhile, so layers ask `is_dynamo_compiling()`, and
torch's own random numbers are set back at the end; rows have generators of their own. CUDA graphs belong to the thread
that records them, so modes that have them compile where they run.
"""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal
from weakref import WeakKeyDictionary

import torch

from pia_ray.pia.components import CompileMode, Components, VariantMemory
from pia_ray.pia.device.timing import Stopwatch
from pia_ray.pia.unet.compilation import CompiledCode, Kind
from pia_ray.pia.unet.compile_costs import ASSUMED, CompileCosts, Cost

log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 24
"""Kinds of forward of one model that are compiled at a time. A mix of three sizes has 9 to 12: see `packing`."""

CompiledPart = Literal["unet", "decoder"]
"""A part of a model that is compiled."""

PATIENCE: Final = 8
"""Forwards of a kind before it is compiled: what occurs less often, as the last rows of a run, does not pay."""

CHECKED: Final = 8
"""Compiled forwards of a kind after which its gain is known."""

DISPLACES: Final = 2
"""A kind takes the place of a compiled one that has occurred this many times less often of late."""

LATE: Final = 4096
"""Forwards after which earlier ones count half, in what has occurred of late."""

_MOST_PENDING: Final = 64
"""Timings that a GPU has not ended; beyond, the oldest ones are left out."""


@dataclass
class _Times:
    """The least seconds of a kind's forwards. Others on the device, such as a compilation, only add to them."""

    plain_s: float = math.inf
    compiled_s: float = math.inf
    num_compiled: int = 0

    @property
    def gain(self) -> float | None:
        """Seconds of an uncompiled forward, divided by those of a compiled one; None before both are known."""
        if self.num_compiled < CHECKED or math.isinf(self.plain_s):
            return None
        return self.plain_s / max(self.compiled_s, 1e-9)


class BackgroundCompilation:
    """The kinds of forward of one model, and of its variants with LoRAs, that are compiled; one compiles at a time.

    `costs` keeps what is measured. With `only_what_pays` a kind is compiled where that saves more seconds of the
    forwards to come than it takes, and one that turns out to be no faster is dropped; else every kind is that has
    occurred more than `patience` times.
    Where `most` are compiled, the one that occurs least gives way. `start` runs its argument, by default on a thread of
    its own; with `in_place` a kind compiles at its next call instead. `needs_end` leaves all uncompiled while nobody
    knows how many forwards are to come.
    """

    def __init__(
        self,
        code: CompiledCode,
        *,
        costs: CompileCosts | None = None,
        only_what_pays: bool = True,
        patience: int = PATIENCE,
        most: int = MOST_GRAPHS,
        in_place: bool = False,
        needs_end: bool = False,
        start: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.code = code
        self._costs = costs
        self._only_what_pays = only_what_pays and costs is not None
        self._patience = patience
        self._most = most
        self._in_place = in_place
        self._needs_end = needs_end
        self._start = start or _on_a_thread
        self._seen: Counter[Kind] = Counter()
        self._recent: Counter[Kind] = Counter()
        self._num_forwards = 0
        self._times: dict[Kind, _Times] = {}
        self._pending: deque[tuple[Kind, bool, Stopwatch]] = deque(maxlen=_MOST_PENDING)
        self._ready: set[Kind] = set()
        self._refused: set[Kind] = set()
        """Kinds that cannot be compiled, or are no faster then."""
        self._warming = False
        self._busy = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether a kind is compiled, or may well be: forwards of few kinds are worth more than few forwards then."""
        return not self._needs_end or bool(self._ready)

    def is_ready(self, kind: Kind, compile_kind: Callable[[], object], *, ahead: float = math.inf) -> bool:
        """Whether the call is to run compiled. If not, it counts, and may start `compile_kind`, which compiles it.

        `ahead` is the number of forwards to come for each one until now; infinite where no end is known.
        """
        self._count(kind)
        self._collect()
        if kind in self._ready:
            return True
        if not self._is_due(kind, ahead):
            return False
        if self._in_place:
            self._add(kind)
        elif self._busy.acquire(blocking=self._warming):
            self._begin(kind, compile_kind)
        return kind in self._ready

    def add_time(self, kind: Kind, watch: Stopwatch, *, compiled: bool) -> None:
        """Adds the timing of a forward, which is read once the device has ended it."""
        if self._costs is not None:
            self._pending.append((kind, compiled, watch))

    @contextmanager
    def warming(self) -> Iterator[None]:
        """A context in which each kind is compiled when it first occurs, on the thread that asks, whatever it costs.

        Not where kinds need an end of the run in sight, which a warm-up does not have. Its forwards are not counted.
        """
        self._warming = not self._needs_end
        try:
            yield
        finally:
            self._warming = False
            self._seen.clear()

    def _count(self, kind: Kind) -> None:
        self._seen[kind] += 1
        self._recent[kind] += 1
        self._num_forwards += 1
        if self._num_forwards % LATE == 0:
            for other in list(self._recent):
                self._recent[other] //= 2
                if not self._recent[other] and other not in self._ready:
                    del self._recent[other], self._seen[other]
                    self._times.pop(other, None)

    def _collect(self) -> None:
        while self._pending and self._pending[0][2].has_ended:
            kind, compiled, watch = self._pending.popleft()
            times = self._times.setdefault(kind, _Times())
            if not compiled:
                times.plain_s = min(times.plain_s, watch.seconds)
                continue
            times.compiled_s = min(times.compiled_s, watch.seconds)
            times.num_compiled += 1
            if times.num_compiled == CHECKED:
                self._check(kind, times)

    def _check(self, kind: Kind, times: _Times) -> None:
        if self._costs is None or (gain := times.gain) is None:
            return
        self._costs.record_gain(kind, gain)
        log.info("forwards of %s take %.2f times as long uncompiled", kind[0], gain)
        if gain <= 1 and self._only_what_pays:
            self._drop(kind)
            self._refused.add(kind)

    def _is_due(self, kind: Kind, ahead: float) -> bool:
        if kind in self._refused:
            return False
        if self._warming:
            return True
        return self._seen[kind] > self._patience and self._pays(kind, ahead) and self._has_room(kind)

    def _pays(self, kind: Kind, ahead: float) -> bool:
        """Whether compiling the kind saves more seconds of the forwards to come than it takes."""
        if self._costs is None or not self._only_what_pays:
            return True
        times = self._times.get(kind)
        if times is None or math.isinf(times.plain_s) or (self._needs_end and math.isinf(ahead)):
            return False
        cost = self._costs.of(kind)
        saved = 1 - 1 / cost.gain
        return saved > 0 and self._seen[kind] * ahead * times.plain_s * saved > cost.compile_s

    def _has_room(self, kind: Kind) -> bool:
        least = self._least()
        return least is None or self._recent[kind] >= DISPLACES * max(1, self._recent[least])

    def _least(self) -> Kind | None:
        """The compiled kind that gives way to a further one; None while there is room."""
        if len(self._ready) < self._most:
            return None
        return min(list(self._ready), key=lambda kind: self._recent[kind])

    def _add(self, kind: Kind) -> None:
        if (least := self._least()) is not None:
            log.info("forwards of %s run uncompiled from now on: others occur more often", least[0])
            self._drop(least)
        self._ready.add(kind)

    def _drop(self, kind: Kind) -> None:
        self._ready.discard(kind)
        self.code.drop(kind)

    def _begin(self, kind: Kind, compile_kind: Callable[[], object]) -> None:
        run = _at_once if self._warming else self._start
        try:
            run(lambda: self._compile(kind, compile_kind))
        except RuntimeError as error:  # the system has no thread left; a later forward asks again
            self._busy.release()
            log.warning("forwards of %s run uncompiled for now: %s", kind[0], error)

    def _compile(self, kind: Kind, compile_kind: Callable[[], object]) -> None:
        started = time.monotonic()
        try:
            compile_kind()
            seconds = time.monotonic() - started
            self._add(kind)
            if self._costs is not None:
                self._costs.record_seconds(kind, seconds)
            log.info("compiled forwards of %s in %.0f s", kind[0], seconds)
        except Exception as error:  # noqa: BLE001 - the thread's end; the kind stays uncompiled
            self._refused.add(kind)
            log.warning("forwards of %s run uncompiled: %s: %s", kind[0], type(error).__name__, error)
        finally:
            self._busy.release()


def compilation_of(components: Components, part: CompiledPart = "unet") -> BackgroundCompilation | None:
    """The compilation of a part of a model and of its variants, which run the same code; None where it has none.

    The decoder has no CUDA graphs, which would hold a decode's memory for ever, and gain little for so few kernels.

    Where the model leaves it open, kinds are compiled that pay, and on a CPU only with the end of the run in sight:
    compilation takes the cores that the rows need.

    Raises:
        ConfigError: the cache of compiled code cannot be read.
    """
    if components.compile_mode is None:
        return None
    mode: CompileMode = components.compile_mode if part == "unet" else "default"
    of_model = _models.setdefault(components.variants, {})
    if (found := of_model.get((part, mode))) is None:
        found = of_model[part, mode] = BackgroundCompilation(
            CompiledCode(mode=mode, cache=components.compile_cache),
            costs=_costs_of(components),
            only_what_pays=components.compiles_what_pays,
            patience=PATIENCE if mode == "default" else 0,
            in_place=mode != "default",
            needs_end=components.compiles_what_pays and components.device.type == "cpu",
        )
    return found


_models: WeakKeyDictionary[VariantMemory, dict[tuple[CompiledPart, CompileMode], BackgroundCompilation]] = (
    WeakKeyDictionary()
)


def _costs_of(components: Components) -> CompileCosts:
    device = components.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    share = f"{torch.get_num_threads()} threads"
    structure = hashlib.sha256(repr(sorted(components.unet.config.items())).encode()).hexdigest()[:12]
    about = (name, share, components.dtype, f"torch {torch.__version__}", components.compile_mode, structure)
    assumed = ASSUMED.get(device.type, Cost(math.inf, 1.0))
    return CompileCosts(assumed, folder=components.compile_cache, about=", ".join(map(str, about)))


def _at_once(run: Callable[[], None]) -> None:
    _with_threads(run, torch.get_num_threads())


def _on_a_thread(run: Callable[[], None]) -> None:
    arguments = (run, torch.get_num_threads())  # of this thread: a new one may have another number
    threading.Thread(target=_with_threads, args=arguments, name="compilation", daemon=True).start()


def _with_threads(run: Callable[[], None], threads: int) -> None:
    # The workers that compile keep to this process's share of cores, as its operators do.
    with torch._inductor.config.patch(compile_threads=max(1, threads)):
        run()
