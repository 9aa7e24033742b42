"""Fetches from slow servers of one owner take no place of another owner."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from pia_ray.errors import Busy
from pia_ray.online.requests.fetch_shares import FetchShares


def shares(patience_s: float | None = 0.0, total: int = 4) -> FetchShares:
    return FetchShares(total=total, per_owner=3, per_host=2, patience_s=patience_s)


def test_an_owner_has_a_share_and_one_host_a_part_of_it():
    async def work() -> None:
        places = shares()
        async with AsyncExitStack() as held:
            for url in ("https://slow.test/1", "https://slow.test/2", "https://other.test/1"):
                await held.enter_async_context(places.hold("bob", url))
                if url.endswith("2"):
                    with pytest.raises(Busy):
                        await held.enter_async_context(places.hold("bob", "https://SLOW.test/3"))
            with pytest.raises(Busy, match="3 pictures of yours") as refused:
                await held.enter_async_context(places.hold("bob", "https://third.test/1"))
            assert refused.value.retry_after_s == 5
            await held.enter_async_context(places.hold("ann", "https://slow.test/1"))
        async with places.hold("bob", "https://slow.test/1"), places.hold("bob", "https://slow.test/2"):
            pass

    asyncio.run(work())


def test_a_free_place_goes_to_the_owner_with_the_fewest():
    async def work() -> None:
        places, order = shares(None, total=2), list[str]()

        async def fetch(owner: str, host: str) -> None:
            async with places.hold(owner, f"https://{host}.test/"):
                order.append(owner)

        async with asyncio.TaskGroup() as group, AsyncExitStack() as held:
            for host in ("a", "b"):
                await held.enter_async_context(places.hold("bob", f"https://{host}.test/"))
            for owner, host in (("bob", "c"), ("bob", "d"), ("ann", "c")):
                group.create_task(fetch(owner, host))
            await asyncio.sleep(0)
            assert order == []
        assert order == ["ann", "bob", "bob"]

    asyncio.run(work())


def test_a_wait_that_is_broken_off_keeps_no_place():
    async def work() -> None:
        places = shares(None, total=1)
        async with places.hold("ann", "https://a.test/"):
            waiting = asyncio.create_task(places.hold("bob", "https://b.test/").__aenter__())
            await asyncio.sleep(0)
        waiting.cancel()  # after the place was granted to it
        await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(5), places.hold("ann", "https://a.test/"):
            pass

    asyncio.run(work())
