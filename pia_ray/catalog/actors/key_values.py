"""The key-value store of the Ray cluster, in which the driver and the actors of a run write to each other."""

from __future__ import annotations

from typing import Final, Protocol

from ray.experimental import internal_kv

_NAMESPACE: Final = b"pia-ray"


class KeyValues(Protocol):
    """Values by key. Every method may raise where the store does not answer."""

    def put(self, key: str, value: bytes) -> None:
        """Writes the value, in place of one that is there."""

    def values(self, prefix: str) -> dict[str, bytes]:
        """The values whose keys begin so, by key."""

    def remove(self, prefix: str) -> None:
        """Removes the values whose keys begin so."""


class ClusterKeyValues:
    """`KeyValues` of the cluster that this process is connected to."""

    def put(self, key: str, value: bytes) -> None:
        """Writes the value, in place of one that is there."""
        internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=_NAMESPACE)

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return bool(internal_kv._internal_kv_exists(key.encode(), namespace=_NAMESPACE))

    def values(self, prefix: str) -> dict[str, bytes]:
        """The values whose keys begin so, by key."""
        keys = internal_kv._internal_kv_list(prefix.encode(), namespace=_NAMESPACE)
        found = ((key.decode(), internal_kv._internal_kv_get(key, namespace=_NAMESPACE)) for key in keys)
        return {key: value for key, value in found if value is not None}

    def remove(self, prefix: str) -> None:
        """Removes the values whose keys begin so."""
        internal_kv._internal_kv_del(prefix.encode(), del_by_prefix=True, namespace=_NAMESPACE)
