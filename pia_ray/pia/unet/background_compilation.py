"""Compilation beside the stream of rows: a kind of forward runs uncompiled while another thread compiles it.

torch 2.13 allows it: its tracing state and its settings are each thread's own (`torch._dynamo.eval_frame.DynamoTLS`,
ContextVars in `torch.utils._config_module`), a lock serialises compilations (`convert_frame.compile_lock`), and code
that one thread compiled is found by all. Two things are the process's: `torch.compiler.is_compiling()` is true in all
threads meanwhile, and torch's own random numbers are set back at the end; rows have generators of their own. CUDA
graphs belong to the thread that records them, so modes that have them compile where they run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import torch

from pia_ray.pia.components import VariantMemory

log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 12
"""Kinds of forward of one model that are compiled; further ones run uncompiled."""

PATIENCE: Final = 8
"""Forwards of a kind before it is compiled: what occurs less often, as the last rows of a run, does not pay."""

Kind = tuple[object, ...]


class BackgroundCompilation:
    """The kinds of forward of one model, and of its variants with LoRAs, that are compiled; one compiles at a time.

    `start` runs its argument, by default on a thread of its own.
    """

    def __init__(self, *, patience: int = PATIENCE, start: Callable[[Callable[[], None]], None] | None = None) -> None:
        self._patience = patience
        self._start = start or _on_a_thread
        self._seen: Counter[Kind] = Counter()
        self._ready: set[Kind] = set()
        self._tried: set[Kind] = set()
        self._busy = threading.Lock()

    def is_ready(self, kind: Kind, compile_kind: Callable[[], None]) -> bool:
        """Whether the kind is compiled. If not, the call counts, and may start `compile_kind`, which compiles it."""
        if kind in self._ready:
            return True
        self._seen[kind] += 1
        is_due = self._seen[kind] > self._patience and kind not in self._tried and len(self._tried) < MOST_GRAPHS
        if is_due and self._busy.acquire(blocking=False):
            self._tried.add(kind)
            self._start(lambda: self._compile(kind, compile_kind))
        return kind in self._ready

    def _compile(self, kind: Kind, compile_kind: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            compile_kind()
            self._ready.add(kind)
            log.info("compiled forwards of %s in %.0f s", kind, time.monotonic() - started)
        except Exception as error:  # noqa: BLE001 - the thread's end; the kind stays uncompiled
            log.warning("forwards of %s run uncompiled: %s: %s", kind, type(error).__name__, error)
        finally:
            self._busy.release()


def compilation_of(variants: VariantMemory) -> BackgroundCompilation:
    """The compilation of a model, the same for its variants with LoRAs, whose forwards run the same code."""
    return _models.setdefault(variants, BackgroundCompilation())


_models: WeakKeyDictionary[VariantMemory, BackgroundCompilation] = WeakKeyDictionary()


def _on_a_thread(run: Callable[[], None]) -> None:
    threads = torch.get_num_threads()

    def compile_by_share() -> None:
        # The workers that compile keep to this process's share of cores, as its operators do.
        with torch._inductor.config.patch(compile_threads=max(1, threads)):
            run()

    threading.Thread(target=compile_by_share, name="compilation", daemon=True).start()
