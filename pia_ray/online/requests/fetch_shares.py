"""Places for fetches from remote servers, shared among owners: slow servers of one owner hold nobody else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from pia_ray.errors import Busy
from pia_ray.formatting import count_of

_RETRY_S = 5.0


@dataclass(eq=False)
class _Waiter:
    owner: str
    host: str
    granted: asyncio.Future[None]


class FetchShares:
    """At most `total` fetches at a time, `per_owner` of one owner and `per_host` of one owner from one host.

    A free place goes to the owner with the fewest fetches. With `patience_s` a fetch waits so long for a place at
    most. For one event loop at a time.
    """

    def __init__(self, *, total: int, per_owner: int, per_host: int, patience_s: float | None) -> None:
        self._limits = (total, per_owner, per_host)
        self._patience_s = patience_s
        self._held: Counter[tuple[str, ...]] = Counter()
        """Fetches by (), by (owner,) and by (owner, host)."""
        self._waiters: list[_Waiter] = []

    @asynccontextmanager
    async def hold(self, owner: str, url: str) -> AsyncIterator[None]:
        """Holds a place for one fetch.

        Raises:
            Busy: none became free in time.
        """
        host = _host(url)
        await self._take(owner, host)
        try:
            yield
        finally:
            self._give_back(owner, host)

    async def _take(self, owner: str, host: str) -> None:
        if self._is_free(owner, host):
            self._add(owner, host, 1)
            return
        waiter = _Waiter(owner, host, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._patience_s):
                await waiter.granted
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif waiter.granted.done() and not waiter.granted.cancelled():  # granted as the wait was broken off
                self._give_back(owner, host)
            if isinstance(error, TimeoutError):
                raise Busy(self._refusal(owner), _RETRY_S) from None
            raise

    def _give_back(self, owner: str, host: str) -> None:
        self._add(owner, host, -1)
        while waiter := self._next():
            self._waiters.remove(waiter)
            if not waiter.granted.done():
                self._add(waiter.owner, waiter.host, 1)
                waiter.granted.set_result(None)

    def _next(self) -> _Waiter | None:
        free = (each for each in self._waiters if self._is_free(each.owner, each.host))
        return min(free, key=lambda each: self._held[(each.owner,)], default=None)

    def _is_free(self, owner: str, host: str) -> bool:
        return all(
            self._held[key] < most for key, most in zip(((), (owner,), (owner, host)), self._limits, strict=True)
        )

    def _add(self, owner: str, host: str, number: int) -> None:
        for key in ((), (owner,), (owner, host)):
            self._held[key] += number
            if not self._held[key]:
                del self._held[key]

    def _refusal(self, owner: str) -> str:
        num_own = self._held[(owner,)]
        return f"{count_of(num_own, 'picture')} of yours being fetched from slow servers: try again, or send files."


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""  # which the fetch refuses
