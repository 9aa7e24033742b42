"""The fields `accept`, `retakes` and `unaccepted` of a request as a policy."""

from __future__ import annotations

from typing import Final

from pia_ray.config.acceptance import MODEL_BOUNDS, NO_BOUNDS, parse_bounds
from pia_ray.config.model import ModelConfig
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter
from pia_ray.online.public_errors import shortened
from pia_ray.takes import Policy

FIELDS: Final = ("accept", "retakes", "unaccepted")

MAX_TEXT: Final = 1000
"""Characters of all bounds together."""


def policy_of(given: dict[str, object], model: ModelConfig, config: ServeConfig) -> Policy:
    """The policy of a request; its fields are removed from `given`.

    Raises:
        BadParameter: a value is not valid, or no video can meet the bounds.
    """
    accept, retakes, unaccepted = (given.pop(name, None) for name in FIELDS)
    texts = _texts(accept)
    own = model.accept if any(text.strip() == MODEL_BOUNDS for text in texts) else ()
    try:
        bounds = parse_bounds([*own, *(text for text in texts if text.strip() not in (MODEL_BOUNDS, NO_BOUNDS))])
    except ValueError as error:
        raise BadParameter(f"accept: {shortened(str(error))}", "accept") from None
    if unaccepted not in (None, "keep", "fail"):
        raise BadParameter(f"unaccepted must be keep or fail (got {shortened(repr(unaccepted))})", "unaccepted")
    count = _count(retakes, config.max_retakes)
    return Policy(bounds, count if bounds else 0, "fail" if unaccepted == "fail" and bounds else "keep")


def fields_of(policy: Policy) -> dict[str, object]:
    """The fields of a request with that policy."""
    if not policy.bounds:
        return {}
    return {
        "accept": [str(bound) for bound in policy.bounds],
        "retakes": policy.retakes,
        "unaccepted": policy.unaccepted,
    }


def _texts(accept: object) -> list[str]:
    values = [] if accept is None else accept if isinstance(accept, list) else [accept]
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values) or sum(map(len, texts)) > MAX_TEXT:
        raise BadParameter(
            f"accept must be bounds such as likeness_min>=0.7, in one text or a list, of {MAX_TEXT} characters at most",
            "accept",
        )
    return texts


def _count(retakes: object, most: int) -> int:
    if retakes is None:
        return 0
    try:
        number = -1.0 if isinstance(retakes, bool) else float(retakes)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not number.is_integer() or not 0 <= number <= most:
        got = shortened(repr(retakes))
        raise BadParameter(f"retakes must be a whole number from 0 to {most} at this endpoint (got {got})", "retakes")
    return int(number)
