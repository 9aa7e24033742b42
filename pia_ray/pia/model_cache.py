"""An LRU cache of models in memory. A model is loaded while the rows of others run.

The cache belongs to one thread; only the loading itself runs on another.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakValueDictionary

import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import lora_strengths
from pia_ray.errors import (
    BadParameter,
    DeviceLost,
    ModelUnavailable,
    OutOfMemory,
    PiaRayError,
    RowError,
    UnexpectedError,
)
from pia_ray.pia.components import Components, Place
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.device.errors import device_is_lost, is_out_of_memory
from pia_ray.pia.device.memory import variant_bytes, variant_room
from pia_ray.pia.loading.lora import Strengths, variant
from pia_ray.pia.unet.forward import Forward

log = logging.getLogger(__name__)

Load = Callable[[], Components]


class Model:
    """A model in memory with its caches of encoded prompts and pictures, and its variants with LoRAs."""

    def __init__(self, components: Components, *, original: Model | None = None) -> None:
        """`original` is the model without LoRAs, of which this one is a variant."""
        self.components = components
        self.forward: Forward
        self.conditions: Conditions
        # A LoRA of the text encoder leaves the UNet as it is, and one of the UNet leaves the encoders.
        if original is not None and original.components.unet is components.unet:
            self.forward = original.forward
        else:
            self.forward = Forward(components)
        if original is not None and original.components.text_encoder is components.text_encoder:
            self.conditions = original.conditions
        else:
            self.conditions = Conditions(components)
        self._variants: OrderedDict[Strengths, Model] = OrderedDict()
        """Those that are kept, the most recently used one last."""
        self._alive: WeakValueDictionary[Strengths, Model] = WeakValueDictionary()
        """Also those that only rows in flight hold."""
        self._made_bytes = 0
        """Of variants made since memory was last freed; modules that nobody holds are not free before."""

    def with_loras(self, params: AnimationParams) -> Model:
        """The model with the row's LoRAs: a variant that is in memory, or one that is made now.

        Raises:
            BadParameter: the row names a LoRA that the model has not.
        """
        if not (loras := self._loras_of(params)):
            return self
        if (found := self._alive.get(loras)) is None:
            size = self._size_of(loras)
            self._drop_variants(size)
            if self._made_bytes + size > variant_room(self.components):
                _free()
                self._made_bytes = self.components.variants.num_bytes
            found = Model(variant(self.components, loras), original=self)
            self._alive[loras] = found
            self.components.variants.sizes[found] = size
            self._made_bytes += size
        self._variants[loras] = found
        self._variants.move_to_end(loras)
        return found

    def make_room(self, params: AnimationParams) -> bool:
        """Drops variants that no row uses, as many as those of the row need; returns whether it has room then."""
        try:
            loras = self._loras_of(params)
        except BadParameter:
            return True
        return not loras or loras in self._alive or self._drop_variants(self._size_of(loras))

    def _loras_of(self, params: AnimationParams) -> Strengths:
        return lora_strengths(params, {name: lora.weight for name, lora in self.components.loras.items()})

    def _size_of(self, loras: Strengths) -> int:
        places = frozenset[Place]().union(*(self.components.loras[name].places for name, _ in loras))
        return variant_bytes(self.components, places)

    def _drop_variants(self, size: int) -> bool:
        """Drops the least recently used variants until there is room for `size` bytes; returns whether there is."""
        room, memory = variant_room(self.components), self.components.variants
        while memory.num_bytes + size > room and self._variants:
            self._variants.popitem(last=False)  # a row in flight keeps its own alive
        return memory.num_bytes + size <= room


class ModelCache:
    """The models in memory by key.

    `keep` bounds their number; it falls when memory turns out to hold fewer. `when_loaded` is called on the loading
    thread when `collect` has something to take.
    """

    def __init__(self, *, keep: int, when_loaded: Callable[[], None]) -> None:
        self._keep = keep
        self._when_loaded = when_loaded
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._loading: dict[str, Future[Components]] = {}
        # One thread: loaders of diffusers and transformers patch torch while they make a module.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.num_loads = 0
        """Loads so far; a model that was loaded twice counts twice."""

    @property
    def loading(self) -> Collection[str]:
        """Keys of the models that are being loaded."""
        return self._loading.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._models

    def __len__(self) -> int:
        return len(self._models)

    def put(self, key: str, components: Components) -> None:
        """Adds a model that has been loaded."""
        self.num_loads += 1
        self._models[key] = Model(components)

    def get(self, key: str) -> Model:
        """The model of that key, which must be in memory; it becomes the most recently used one."""
        self._models.move_to_end(key)
        return self._models[key]

    def make_room(self, key: str, params: AnimationParams) -> bool:
        """Whether a row of that model, which must be in memory, has room for its variant, as `Model.make_room`."""
        return self._models[key].make_room(params)

    def start_loading(self, key: str, load: Load, *, busy: Collection[str]) -> bool:
        """Starts to load a model, and drops one that is not `busy` where the cache is full.

        Returns whether loading has started: False where all models in memory are busy.
        """
        if len(self._models) + len(self._loading) >= self._keep:
            victim = next((other for other in self._models if other not in busy), None)
            if victim is None:
                return False
            self._drop(victim)
        self._loading[key] = self._loader.submit(load)
        self._loading[key].add_done_callback(lambda _: self._when_loaded())
        return True

    def collect(self) -> dict[str, RowError]:
        """Adds the models that have been loaded; returns the errors of those that could not be, by key.

        Where memory ran out while other models were in memory, fewer are kept from now on, and the key may be tried
        again.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        failed: dict[str, RowError] = {}
        for key in [key for key, future in self._loading.items() if future.done()]:
            future = self._loading.pop(key)
            error = future.exception()
            if error is None:
                self.put(key, future.result())
            elif is_out_of_memory(error) and self._models:
                self._keep = max(1, len(self._models))
                log.warning("out of memory: from now on %d models are kept at most", self._keep)
                _free()
            else:
                failed[key] = _row_error(error)
        return failed

    def close(self) -> None:
        """Drops all models; one that is being loaded is waited for."""
        self._loader.shutdown(cancel_futures=True)
        self._loading.clear()
        self._models.clear()
        _free()

    def _drop(self, key: str) -> None:
        started = time.perf_counter()
        version = self._models.pop(key).components.version
        _free()
        log.info("model %s dropped in %.1f s", version, time.perf_counter() - started)


def cache_key(model: ModelConfig) -> str:
    """A key that is equal for models that are the same in memory."""
    return model.model_dump_json(exclude={"defaults", "description", "long_edge", "size_step"})


def _row_error(error: BaseException) -> RowError:
    if isinstance(error, PiaRayError):
        return ModelUnavailable(f"the model of this style cannot be loaded: {error.message}")
    if is_out_of_memory(error):
        return OutOfMemory("the model of this style does not fit in memory even alone: take a larger device")
    if device_is_lost(error):
        raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
    text = "".join(traceback.format_exception(error)).strip()
    return UnexpectedError(f"{type(error).__name__}: {error}\n{text}")


def _free() -> None:
    """Returns the memory of dropped models: modules are cyclic, and torch caches the GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
