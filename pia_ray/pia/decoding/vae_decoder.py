"""The VAE's decoder, compiled where the UNet is: it runs as it is while another thread compiles a kind of decode."""

from __future__ import annotations

from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

import torch

from pia_ray.pia.components import Components, VariantMemory, sharing_copy
from pia_ray.pia.device.timing import Stopwatch
from pia_ray.pia.unet.background_compilation import compilation_of
from pia_ray.pia.unet.choices import choices_on
from pia_ray.pia.unet.upsample import make_transposed_weights

COMPILED_FRAMES: Final = 4
"""Most frames of a decode that may be compiled: few kinds occur, and the thread that compiles one takes little memory
beside the stream. A picture of 512 x 512 px alone has enough pixels for a GPU."""


class VaeDecoder:
    """The decoder of one model and of its variants with LoRAs, which have the same VAE."""

    def __init__(self, components: Components) -> None:
        self.vae = components.vae
        self._choices = choices_on(components.device)
        self._timed: set[tuple[object, ...]] = set()
        self._compilation = compilation_of(components, "decoder")

    @property
    def most_frames(self) -> int | None:
        """The most frames of one decode; None: what fits."""
        return None if self._compilation is None or not self._compilation.is_on else COMPILED_FRAMES

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Values [N, 3, H, W], about -1 to 1, of latents [N, 4, h, w] in the VAE's scale and precision."""
        kind = ("decode", *latents.shape)
        # Another thread that compiles holds Python's lock, which delays what a timing sends to the GPU.
        if self._choices is not None and kind not in self._timed and not torch.compiler.is_compiling():
            with self._choices.choosing():
                values = self._plain(latents)
            self._timed.add(kind)
            return values
        if self._compilation is None:
            return self._plain(latents)
        inner = latents if self.vae.post_quant_conv is None else self.vae.post_quant_conv(latents)
        compiled = self._compilation.is_ready(kind, lambda: self._compile(kind, inner))
        watch = Stopwatch(latents.device)
        decoder = partial(self._compilation.code, kind, self.vae.decoder) if compiled else self.vae.decoder
        decoded: torch.Tensor = decoder(inner)
        self._compilation.add_time(kind, watch.stop(), compiled=compiled)
        return decoded

    def _plain(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def _compile(self, kind: tuple[object, ...], inner: torch.Tensor) -> None:
        assert self._compilation is not None
        make_transposed_weights(self.vae)
        with torch.inference_mode():
            self._compilation.code.compile(kind, sharing_copy(self.vae.decoder), inner)


def decoder_of(components: Components) -> VaeDecoder:
    """The decoder of a model, the same for its variants."""
    found = _models.get(components.variants)
    if found is None or found.vae is not components.vae:
        found = _models[components.variants] = VaeDecoder(components)
    return found


_models: WeakKeyDictionary[VariantMemory, VaeDecoder] = WeakKeyDictionary()
