"""The models of an animator: one that is there from the start, and those of its styles, loaded while rows run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pia_ray.config.model import ModelConfig, check_style_name
from pia_ray.errors import ConfigError, WeightsError
from pia_ray.pia.admission import AdmissionQueue
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.schedulers import check_settings
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.weight_sharing import WeightPool
from pia_ray.pia.model_cache import ModelCache, cache_key
from pia_ray.weights import resolve as resolve_weights

log = logging.getLogger(__name__)


class StyleModels:
    """The models by key. The first one is loaded by the constructor, others by `start_next`.

    `keep` and `when_loaded` are `ModelCache`'s. Weights that models have in common are in memory once.

    Raises:
        WeightsError: the first model cannot be loaded.
        ConfigError: its device does not exist, or the name of a style is not valid.
    """

    def __init__(
        self, first: ModelConfig, styles: Mapping[str, ModelConfig], *, keep: int, when_loaded: Callable[[], None]
    ) -> None:
        if keep < 1:
            raise ConfigError(f"keep_models must be at least 1 (got {keep})")
        for name in styles:
            try:
                check_style_name(name)
            except ValueError as error:
                raise ConfigError(f"styles: {error}") from None
        self._configs = {cache_key(each): each for each in (first, *styles.values())}
        self._weight_pool = WeightPool() if len(self._configs) > 1 else None
        self.first = self._load(first)
        """The parts of the first model."""
        self.cache = ModelCache(keep=keep, when_loaded=when_loaded)
        self.cache.put(cache_key(first), self.first)

    def start_next(self, queue: AdmissionQueue[Any], *, running: Iterable[str]) -> bool:
        """Starts to load the model that rows have waited for longest, if one in memory can be dropped for it.

        Returns whether loading has started; `running` are the keys of rows in flight.
        """
        wanted = queue.models
        missing = next((key for key in wanted if key not in self.cache), None)
        if missing is None or missing in self.cache.loading:
            return False
        busy = set(running)
        if missing != wanted[0] or queue.first_may_wait:
            busy.update(wanted)  # rows that wait for a model in memory go first
        return self.cache.start_loading(missing, partial(self._load, self._configs[missing]), busy=busy)

    def _load(self, model: ModelConfig) -> Components:
        started = time.perf_counter()
        components = assemble(resolve_weights(model), model, self._weight_pool)
        check_settings(components.scheduler_config)
        _check_latent_scale(components)
        log.info("model %s loaded in %.1f s", components.version, time.perf_counter() - started)
        return components


def _check_latent_scale(components: Components) -> None:
    try:
        scale = components.latent_scale
    except (TypeError, ValueError):
        scale = math.nan
    if not 0 < scale < math.inf:
        given = components.vae.config["scaling_factor"]
        raise WeightsError(f"scaling_factor in the VAE's config.json must be a number above 0 (got {given!r})")
