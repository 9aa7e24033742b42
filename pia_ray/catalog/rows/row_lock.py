"""`RowLock`: a lock that the rows of one process hold together, or one row alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RowLock:
    """A lock that the rows of one process hold together, or one row alone.

    A row that was in the engine when its worker died is a suspect: alone it can neither end its neighbours nor be
    charged with what they do. Suspects go first, so that a stream of other rows does not keep them waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_holding = 0
        self._held_alone = False
        self._num_suspects = 0

    @contextmanager
    def hold(self, *, alone: bool, given_up: Callable[[], bool]) -> Iterator[bool]:
        """Waits until the row may begin, and holds the lock for the block; False, and no lock, once `given_up` is true.

        `given_up` is asked again after each call of `wake`.
        """
        with self._changed:
            self._num_suspects += alone
            self._changed.wait_for(lambda: given_up() or self._is_free(alone=alone))
            self._num_suspects -= alone
            held = not given_up()
            if held:
                self._held_alone = alone
                self._num_holding += 1
            self._changed.notify_all()
        try:
            yield held
        finally:
            if held:
                with self._changed:
                    self._num_holding -= 1
                    self._held_alone = False
                    self._changed.notify_all()

    def wake(self) -> None:
        """Lets all that wait ask again whether they give up."""
        with self._changed:
            self._changed.notify_all()

    def _is_free(self, *, alone: bool) -> bool:
        if alone:
            return not self._num_holding
        return not self._held_alone and not self._num_suspects
