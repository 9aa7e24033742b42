"""`Web`, the settings by which one process of a run fetches pictures: its reach, its name, the pace of hosts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pia_ray.errors import FetchOptedOut
from pia_ray.storage.host_rates import HostRates

USER_AGENT: Final = "pia-ray"

_OPT_OUTS: Final = frozenset({"noai", "noimageai"})
"""Directives of X-Robots-Tag by which the owner of a picture refuses models, as img2dataset takes them."""


@dataclass(frozen=True)
class Web:
    """The web as the rows of one process see it. Without arguments: public https:// servers, without pause."""

    allow_http: bool = False
    allowed_networks: Sequence[str] = ()
    """Networks such as "10.1.0.0/16" that may be reached although they are not public."""
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """Fields of requests by the host that they are sent to, in lower case."""
    user_agent: str = USER_AGENT
    obey_opt_outs: bool = False
    """Whether a picture whose X-Robots-Tag says noai or noimageai is refused."""
    rates: HostRates = field(default_factory=HostRates)
    patience_s: float = 60.0
    """The longest wait for the turn of a host."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Ends waits early."""
    note: Callable[[bool], None] = lambda waits: None
    """Is called with true while a fetch waits for its turn, and false afterwards."""

    def noting(self, note: Callable[[bool], None]) -> Web:
        """The same, sharing the pace of hosts, with another `note`."""
        return replace(self, note=note)

    def wait(self, host: str) -> float:
        """The seconds waited for the host's turn.

        Raises:
            FetchUnavailable: it comes later than in `patience_s`, or the wait was stopped.
        """
        return self.rates.wait(host, limit_s=self.patience_s, stopped=self.stopped, note=self.note)

    def fields(self, host: str, *, private: bool) -> list[tuple[bytes, bytes]]:
        """The fields of a request to the host; those of `headers` only where `private` says so."""
        own = self.headers.get(host, {}) if private else {}
        names = {name.lower() for name in own}
        usual = (("User-Agent", self.user_agent), ("Accept", "image/*,*/*;q=0.5"), ("Accept-Encoding", "identity"))
        fields = {**{name: value for name, value in usual if name.lower() not in names}, **own}
        return [(name.encode("ascii"), value.encode("ascii")) for name, value in fields.items()]

    def check_opt_out(self, robots_tags: Sequence[bytes], shown: str) -> None:
        """Refuses a picture by its fields X-Robots-Tag, where they are obeyed.

        Raises:
            FetchOptedOut: one says noai or noimageai, to all or to this user agent.
        """
        if not self.obey_opt_outs:
            return
        token = self.user_agent.partition("/")[0].strip().lower()
        for tag in robots_tags:
            agent, colon, directives = tag.decode("latin-1").lower().rpartition(":")
            if colon and agent.strip() != token:
                continue
            if found := _OPT_OUTS.intersection(part.strip() for part in directives.split(",")):
                raise FetchOptedOut(f"{shown} says {min(found)} in X-Robots-Tag: its owner refuses models.")
