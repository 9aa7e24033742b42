"""The conditions of a row's denoising: text embeddings, the picture's latent, the affinity mask; with caches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from cachetools import LRUCache
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from pia_ray.config.knob_types import PromptSyntax
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import BadParameter
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.affinity import affinity, keyframe_affinity
from pia_ray.pia.denoising.prompt_tokens import TokenChunk, chunk_length, chunks_of
from pia_ray.pia.device.vae_tiling import TILE_PIXELS, is_tiled, tiled
from pia_ray.pia.evaluation import ImageTokens, Text
from pia_ray.pia.loading.ip_adapter import encode_picture, image_tokens
from pia_ray.pia.transfers import to_device
from pia_ray.types import PreparedRequest

MOST_TOKENS: Final = 12_000
"""Tokens of a prompt's chunks. Plain text has fewer. BREAKs could make 128,000, for whose attention all rows wait."""
CACHED_PROMPTS: Final = 256
CACHED_PICTURES: Final = 64


def affinity_mask(
    params: AnimationParams, *, keyframes: Sequence[int], device: torch.device, still: torch.Tensor | None = None
) -> torch.Tensor:
    """The row's affinity coefficients as a mask [1, T, 1, 1] in float32, equal for all latent pixels.

    `still` [h, w] is how still each latent pixel is to be, 0 to 1; with it the mask is [1, T, h, w]:
    coefficient + still * (1 - coefficient).
    """
    if len(keyframes) == 1:
        coefficients = affinity(
            params.motion_scale,
            params.num_frames,
            condition_frame=keyframes[0],
            coefficients=params.affinity,
        )
    else:
        coefficients = keyframe_affinity(
            params.motion_scale, params.num_frames, keyframes=keyframes, coefficients=params.affinity
        )
    mask = to_device(torch.tensor(coefficients, dtype=torch.float32), device).view(1, -1, 1, 1)
    # lerp is exact at both ends.
    return mask if still is None else torch.lerp(mask, torch.ones_like(mask), to_device(still, device))


def stillness(mask_image: Image.Image, factor: int) -> torch.Tensor:
    """The stillness of each latent pixel, [h, w], 0 (white) to 1 (black): the mean over its pixels of the mask."""
    values = torch.from_numpy(np.array(mask_image.convert("L"), dtype=np.float32)) / 255  # [H, W]
    return 1 - torch.nn.functional.avg_pool2d(values[None, None], factor)[0, 0]


class Conditions:
    """Encodes prompts and pictures for one model, and caches the most recently used ones."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self._prompts: LRUCache[tuple[str, int | None, PromptSyntax, int | None], torch.Tensor] = LRUCache(
            CACHED_PROMPTS
        )
        self._pictures: LRUCache[str, tuple[torch.Tensor, torch.Tensor]] = LRUCache(CACHED_PICTURES)
        self._embeddings: LRUCache[str, torch.Tensor] = LRUCache(CACHED_PICTURES)

    def prompt(
        self, text: str, *, clip_skip: int | None, syntax: PromptSyntax = "plain", length: int | None = None
    ) -> torch.Tensor:
        """The embedding of a prompt, [n * L, C], for n chunks of the text encoder's length L.

        `length` asks for a longer one, as `lengthened` makes it.

        Raises:
            BadParameter: clip_skip leaves no layer of this text encoder, or the prompt has more than MOST_TOKENS.
        """
        key = (text, clip_skip, syntax, length)
        if (known := self._prompts.get(key)) is None:
            chunks = chunks_of(text, self.components, syntax=syntax)
            if (tokens := len(chunks) * chunk_length(self.components)) > MOST_TOKENS:
                raise BadParameter(
                    f"the chunks of a prompt have {MOST_TOKENS:,} tokens at most, those of {text[:40]!r} {tokens:,}: "
                    "leave out BREAKs or words of textual inversions",
                    "prompt",
                )
            known = torch.cat([self._chunk(chunk, clip_skip=clip_skip) for chunk in chunks])
            if length is not None:
                known = self.lengthened(known, length, clip_skip=clip_skip)
            self._prompts[key] = known
        return known

    def lengthened(self, embedding: torch.Tensor, length: int, *, clip_skip: int | None) -> torch.Tensor:
        """The embedding with embeddings of the empty prompt after it, as long as `length`; unchanged where no number
        of them gives that."""
        missing, unit = length - len(embedding), chunk_length(self.components)
        if missing <= 0 or missing % unit:
            return embedding
        empty = self.prompt("", clip_skip=clip_skip)
        return torch.cat([embedding, *[empty] * (missing // unit)])

    @torch.inference_mode()
    def _chunk(self, chunk: TokenChunk, *, clip_skip: int | None) -> torch.Tensor:
        """[L, C]"""
        parts = self.components
        layers = parts.text_encoder.config.num_hidden_layers
        if clip_skip is not None and clip_skip >= layers:
            raise BadParameter(f"clip_skip must be 0 to {layers - 1} for this model (got {clip_skip})", "clip_skip")
        tokenizer, length = parts.tokenizer, chunk_length(parts)
        ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        tokens = to_device(torch.tensor([ids]), parts.device)
        if clip_skip is None:
            embedding = parts.text_encoder(tokens).last_hidden_state[0]
        else:
            output = parts.text_encoder(tokens, output_hidden_states=True)
            embedding = parts.text_encoder.final_layer_norm(output.hidden_states[-(clip_skip + 1)])[0]
        if chunk.is_weighted:
            embedding = _weighted(embedding, [1.0, *chunk.weights])
        return embedding.to(parts.dtype)

    def embedding(self, values: np.ndarray[Any, Any], *, field: str) -> torch.Tensor:
        """A given embedding, [L, C], in the model's precision and on its device.

        Raises:
            BadParameter: it has another width than the model's own; names the `field`.
        """
        parts = self.components
        width = int(parts.text_encoder.config.hidden_size)
        if values.ndim != 2 or values.shape[1] != width or not len(values):
            raise BadParameter(f"{field} must be [L, {width}] for this model (got {list(values.shape)})", field)
        return to_device(torch.tensor(values, dtype=torch.float32), parts.device).to(parts.dtype)

    @torch.inference_mode()
    def picture(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """The picture's condition latent, [4, h, w] in float32, scaled for the UNet; one draw from `generator`.

        The moments of the posterior are cached by content; the sample is the row's own.
        """
        pixels = np.asarray(image)
        key = _digest(pixels)
        if (moments := self._pictures.get(key)) is None:
            self._pictures[key] = moments = self._encode(pixels)
        mean, std = moments
        noise = to_device(torch.randn(mean.shape, generator=generator, dtype=torch.float32), mean.device)
        return (mean + std * noise) * self.components.latent_scale

    @torch.inference_mode()
    def picture_tokens(self, request: PreparedRequest) -> dict[Text, ImageTokens]:
        """The IP-Adapter's tokens of the request's picture or embeddings, for the guidance branch of each text.

        Empty where the request has neither, or at scale 0. Embeddings of pictures are cached by content.

        Raises:
            BadParameter: this model cannot take what the request has.
        """
        picture, embeds = request.ip_adapter_image, request.ip_adapter_image_embeds
        if picture is None and embeds is None:
            return {}
        field = "ip_adapter_image" if picture is not None else "ip_adapter_image_embeds"
        if picture is not None and embeds is not None:
            raise BadParameter("give either ip_adapter_image or ip_adapter_image_embeds, not both", field)
        adapter = self.components.ip_adapter
        if adapter is None:
            raise BadParameter(f"{field} needs a model with an ip_adapter, and this one has none", field)
        if picture is not None and adapter.image_encoder is None:
            raise BadParameter(
                f"{field} needs a model with an image_encoder: give it one, or give ip_adapter_image_embeds", field
            )
        scale = request.params.ip_adapter_scale
        if scale == 0:
            return {}
        if embeds is not None:
            return image_tokens(adapter, torch.tensor(embeds, dtype=torch.float32), scale=scale)
        assert picture is not None
        key = _digest(np.asarray(picture))
        if (embedding := self._embeddings.get(key)) is None:
            self._embeddings[key] = embedding = encode_picture(adapter, picture)
        return image_tokens(adapter, embedding, scale=scale)

    def _encode(self, pixels: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self.components
        values = to_device(torch.from_numpy(pixels.copy()), parts.device).float() / 127.5 - 1
        values = values.permute(2, 0, 1)[None].to(parts.vae_dtype)  # [1, 3, H, W]
        posterior = encode(parts, values)
        return posterior.mean[0].float(), posterior.std[0].float()


def encode(components: Components, values: torch.Tensor) -> DiagonalGaussianDistribution:
    """The VAE's posterior of pictures [N, 3, H, W], in the VAE's precision, -1 to 1; large pictures in tiles."""
    vae, factor = components.vae, components.spatial_factor
    height, width = values.shape[-2:]
    if not is_tiled(components.vae_tiling, height=height, width=width):
        return vae.encode(values).latent_dist
    # The blended values are the moments, mean and log variance: [N, 8, h, w].
    return DiagonalGaussianDistribution(
        tiled(lambda tile: vae.encode(tile).latent_dist.parameters, values, tile=TILE_PIXELS, scale=1 / factor)
    )


def _weighted(embedding: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The embedding [L, C] with a factor on each of its first tokens, and the mean that it had before.

    Source: A1111's web UI, emphasis "Original".
    """
    factors = torch.ones(len(embedding), 1)
    factors[: len(weights), 0] = torch.tensor(weights)
    values = embedding.float()
    scaled = values * to_device(factors, embedding.device)
    return (scaled * (values.mean() / scaled.mean())).to(embedding.dtype)


def _digest(pixels: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest()
