"""Imports of large packages: without Python's cyclic garbage collector, and beside other work."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

_is_own = threading.Event()


def own_process() -> None:
    """Says that this process is a command or a worker of ours, whose imports the collector may leave out for good.

    A full collection, such as the one after a model is dropped, goes through 0.6 s of libraries' objects otherwise, and
    so does the end of the process. In a program of somebody else, models that it holds would never be freed.
    """
    _is_own.set()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Has Python collect no cyclic garbage in the block, on any thread.

    Imports make a million objects that stay. The collector goes through them again and again: 0.9 of 3.8 s of CPU
    time where torch, diffusers and transformers are imported, 0.1 of 0.7 s for Ray Data (Python 3.11, torch 2.13). The
    first collection after the block would go through all of them, too, for 0.7 s, so they become old ones at its end,
    where the block has imported anything.
    """
    was_on, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if len(sys.modules) > num_modules:
                _make_old()
            gc.enable()


def _make_old() -> None:
    if _is_own.is_set():
        gc.freeze()
    elif not gc.get_freeze_count():  # else what the program, or Python 3.12 itself, has frozen would thaw
        gc.freeze()
        gc.unfreeze()  # puts them into the oldest generation


def begin_import(module: str) -> threading.Thread:
    """The thread that imports the module. Its caller joins it and imports the module too, which raises what failed.

    Python runs one thread at a time, so this is for a caller that waits for another process meanwhile.
    """

    def load() -> None:
        with suppress(Exception), collector_paused():  # the caller's own import raises it again
            import_module(module)

    thread = threading.Thread(target=load, name=f"import-{module}", daemon=True)
    thread.start()
    return thread
