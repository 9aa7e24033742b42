"""Threads that are used again: no call waits for another one, and nothing of a call stays."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future
from contextvars import ContextVar

from pia_ray import spare_threads

WORD: ContextVar[str] = ContextVar("word", default="none")


def started(name: str = "call") -> tuple[threading.Thread, str, str]:
    """The thread of a call, its name, and what is left of the context of an earlier one."""
    found: Future[tuple[threading.Thread, str, str]] = Future()

    def call() -> None:
        thread, word = threading.current_thread(), WORD.get()
        WORD.set("left")
        found.set_result((thread, thread.name, word))

    spare_threads.start(call, name=name)
    return found.result(30)


def until_idle(thread: threading.Thread) -> None:
    while thread not in spare_threads._idle:
        threading.Event().wait(0.001)


def test_calls_have_the_threads_of_those_that_have_ended_and_nothing_else_of_them() -> None:
    threads = set()
    for number in range(5):
        thread, name, word = started(str(number))
        assert (name, word) == (str(number), "none")
        until_idle(thread)
        threads.add(thread)
    assert len(threads) < 5


def test_calls_that_hang_keep_no_other_one_waiting() -> None:
    release, hung = threading.Event(), [Future[threading.Thread]() for _ in range(3)]

    def hang(thread: Future[threading.Thread]) -> None:
        thread.set_result(threading.current_thread())
        release.wait(30)

    for each in hung:
        spare_threads.start(lambda each=each: hang(each), name="hung")
    threads = {each.result(30) for each in hung}
    assert len(threads) == 3
    assert started()[0] not in threads
    release.set()


def test_what_a_call_holds_is_freed_when_it_ends_though_its_thread_stays() -> None:
    class Frames:
        pass

    frames, ended = Frames(), Future[threading.Thread]()
    held = weakref.ref(frames)

    def call(frames: Frames = frames) -> None:
        ended.set_result(threading.current_thread())

    spare_threads.start(call, name="call")
    until_idle(ended.result(30))
    del frames, call
    gc.collect()
    assert held() is None
