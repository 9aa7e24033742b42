"""Ray Data's three actors beside those of a run, which a run goes without on a cluster of its own.

Each is a process. One shares a cluster that grows between datasets, one counts for the dashboard, one knows the nodes
of actors: a cluster of a run's own has one node and no dashboard. A run of two rows of the demo model took 21 s of CPU
time with the first two of them and 17 s without (2 cores, ray 2.60).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from ray.data._internal.execution.operators import actor_pool_map_operator as pool
from ray.data._internal.utils import cached_ray_internals as cached


@contextmanager
def without_helper_actors() -> Iterator[None]:
    """Has executions that begin in the block start none of them. One such block at a time."""
    before = [getattr(module, name) for module, name, _ in _GETTERS]
    for module, name, stand_in in _GETTERS:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), getter in zip(_GETTERS, before, strict=True):
            setattr(module, name, getter)


class _Method:
    """A method as a handle of an actor has it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def remote(self, *_: Any, **__: Any) -> Any:
        return self._call()


_NOTHING: Final = _Method(lambda: None)


class _WholeCluster:
    """Gives the only dataset all that the cluster has."""

    request_resources = cancel_request = _NOTHING

    def __init__(self) -> None:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        resources = ray.put({node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]})
        self.get_reserved_resources = _Method(lambda: resources)


class _NoStatistics:
    """Counts nothing."""

    register_dataset = update_execution_metrics = update_iteration_metrics = _NOTHING


class _OneNode:
    """Has no news of where an actor is, which is where it started. Actors have a copy."""

    update_actor_location = _NOTHING
    get_actor_locations = _Method(lambda: ray.put({}))


_GETTERS: Final = (
    (coordinator, "get_or_create_autoscaling_coordinator", _WholeCluster),
    (stats, "get_or_create_stats_actor", _NoStatistics),
    (pool, "get_or_create_actor_location_tracker", _OneNode),
    (cached, "get_or_create_actor_location_tracker", _OneNode),
)
"""Where Ray Data gets each actor, and what stands in for it. May go when Ray Data has a setting (ray 2.60)."""
