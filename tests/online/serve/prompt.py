"""Options of deployments under which Serve waits for little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PROMPT: Final = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1}
"""Serve's options of a deployment whose dead replicas are found within a second, in place of ten, and whose idle ones
end at once, in place of after two."""


def prompt_serve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The endpoint's settings, with PROMPT for all that they do not say of its deployments."""
    deployments = ("deployment_config", "ingress_deployment_config")
    return {**settings, **{name: {**PROMPT, **settings.get(name, {})} for name in deployments}}
