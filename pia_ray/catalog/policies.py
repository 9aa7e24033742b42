"""The policies of a run's rows: its bounds and retakes, and the cells of a row that replace them."""

from __future__ import annotations

from pia_ray.config.acceptance import MODEL_BOUNDS, MOST_RETAKES, NO_BOUNDS, parse_bounds
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import BadParameter
from pia_ray.takes import Policy


def policy_of(config: CatalogConfig, *, style: str, accept: str | None = None, retakes: str | None = None) -> Policy:
    """The policy of a row of that style; cells that are given replace what the run says.

    Raises:
        BadParameter: a cell has no valid value, or there is no such style.
    """
    texts = config.accept if accept is None else () if accept.strip() == NO_BOUNDS else (accept,)
    count = config.retakes
    if retakes is not None:
        if not _is_count(retakes):
            raise BadParameter(f"retakes must be a whole number from 0 to {MOST_RETAKES} (got {retakes!r})", "retakes")
        count = int(float(retakes))
    own = config.model_for(style).accept if any(text.strip() == MODEL_BOUNDS for text in texts) else ()
    try:
        bounds = parse_bounds([*own, *(text for text in texts if text.strip() != MODEL_BOUNDS)])
    except ValueError as error:
        raise BadParameter(f"accept: {error}", "accept") from None
    return Policy(bounds, count, config.unaccepted)


def _is_count(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return value.is_integer() and 0 <= value <= MOST_RETAKES
