"""Where the nodes of a test's cluster are: network namespaces behind a bridge, each with an address of its own, or, on
a machine that permits none, all of them on its loopback. Knows nothing of Ray.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CONNECTS = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"


class Network(Protocol):
    """Gives nodes their places."""

    host: str
    """The address of this machine as the nodes see it."""
    shared: str
    """Why all nodes have the same address; empty where each has one of its own."""

    def place(self) -> Place:
        """A new place for a node."""

    def close(self) -> None:
        """Removes all places. Nothing may be at work in them."""


@dataclass(frozen=True)
class Place:
    """Where one node is."""

    address: str
    namespace: str = ""

    def command(self, *words: str) -> list[str]:
        """The command line that runs these words there."""
        return ["ip", "netns", "exec", self.namespace, *words] if self.namespace else list(words)

    def processes(self, first: int) -> set[int]:
        """Living processes there; where all share one address, those that come from the process `first`."""
        if not self.namespace:
            return family(first)
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return {int(pid) for pid in listed.stdout.split()}


def open_network() -> Network:
    """Namespaces where this machine permits them, else its loopback."""
    if os.geteuid() != 0:
        return Loopback("not root: no network namespaces")
    if shutil.which("ip") is None:
        return Loopback("there is no `ip` command (Debian: iproute2): no network namespaces")
    network = Namespaces()
    try:
        network.open()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        with suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError):
            network.close()  # what is half there may not go either
        said = (getattr(error, "stderr", "") or "").strip()
        return Loopback(f"this machine permits no network namespaces: {error} {said}".strip())
    return network


class Loopback:
    """All nodes on 127.0.0.1, each with ports of its own."""

    host = "127.0.0.1"

    def __init__(self, reason: str) -> None:
        self.shared = reason

    def place(self) -> Place:
        """The one place."""
        return Place(self.host)

    def close(self) -> None:
        """Nothing to remove."""


class Namespaces:
    """A bridge and namespaces behind it. Their addresses are of 198.18.0.0/15, which no network uses (RFC 2544)."""

    shared = ""

    def __init__(self) -> None:
        self._bridge = f"pia{secrets.token_hex(4)}"
        self._subnet = f"198.{18 + secrets.randbelow(2)}.{secrets.randbelow(256)}"
        self._places: list[Place] = []
        self.host = f"{self._subnet}.1"

    def open(self) -> None:
        """Makes the bridge, and sees whether two places and this machine reach each other.

        Raises:
            CalledProcessError, TimeoutExpired, OSError: the machine does not permit it.
        """
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        places = [self.place(), self.place()]
        with socket.create_server((self.host, 0)) as server:
            command = places[0].command(sys.executable, "-c", CONNECTS, self.host, str(server.getsockname()[1]))
            subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        self._reach(places[0], places[1])
        for place in places:
            self._remove(place)

    def place(self) -> Place:
        """A new namespace behind the bridge."""
        number = len(self._places) + 2
        place = Place(f"{self._subnet}.{number}", f"{self._bridge}-{number}")
        inner, outer = f"{self._bridge}i{number}", f"{self._bridge}o{number}"
        self._places.append(place)
        _ip("netns", "add", place.namespace)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", place.namespace)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", place.namespace, "link", "set", "lo", "up")
        _ip("-n", place.namespace, "address", "add", f"{place.address}/24", "dev", inner)
        _ip("-n", place.namespace, "link", "set", inner, "up")
        return place

    def close(self) -> None:
        """Removes the namespaces and the bridge."""
        for place in self._places:
            self._remove(place)
        if Path("/sys/class/net", self._bridge).exists():
            _ip("link", "delete", self._bridge)

    def _remove(self, place: Place) -> None:
        if Path("/run/netns", place.namespace).exists():
            _ip("netns", "delete", place.namespace)

    def _reach(self, one: Place, other: Place) -> None:
        listens = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('up', flush=True); s.accept()"
        with subprocess.Popen(one.command(sys.executable, "-c", listens), stdout=subprocess.PIPE) as server:
            try:
                server.stdout.readline()
                command = other.command(sys.executable, "-c", CONNECTS, one.address, "7000")
                subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            finally:
                server.kill()


def free_port() -> int:
    """A port of this machine that is free now, and that nobody gets who asks for any: those are above 32768."""
    for _ in range(100):
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("there is no free port")


def family(first: int) -> set[int]:
    """A living process and all that come from it."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    found, frontier = set[int](), {first} & parents.keys()
    while frontier:
        found |= frontier
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - found
    return found


def until(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Waits until `condition()` is true; the time is for slow machines, none depends on it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds:.0f} s: {what}"
        time.sleep(0.25)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60, check=True)
