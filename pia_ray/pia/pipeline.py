"""`PIAPipeline`: the interface of diffusers' pipeline over an `Animator`, for programs that were written for diffusers.

`pipeline_inputs` turns its arguments into requests. What differs from diffusers is in docs/diffusers.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import MotionAdapter
from diffusers.models.modeling_utils import ModelMixin

from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import BadParameter
from pia_ray.pia import pipeline_inputs as inputs
from pia_ray.pia.animator import Animator
from pia_ray.pia.denoising.schedulers import name_of
from pia_ray.pia.loading.load import own_scheduler, own_side
from pia_ray.temporary_folders import temporary_folder
from pia_ray.types import OutputType
from pia_ray.weights import resolve


class PIAPipeline:
    """diffusers' `PIAPipeline`, whose videos of one call denoise together.

    The model is loaded at the first call, and again at the next call after a method has changed how it is loaded.
    `close` frees it at once.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        weights = resolve(model)
        self._scheduler, self._side = own_scheduler(weights, model), own_side(weights)
        self._knobs, self._free_init = dict[str, Any](), dict[str, Any]()
        self._animator: Animator | None = None
        self._finalizer: Callable[[], object] = lambda: None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        motion_adapter: MotionAdapter | str | Path | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        vae: ModelMixin | str | Path | None = None,
        scheduler: Any = None,
        revision: str | None = None,
    ) -> Self:
        """The pipeline of a hub id, a folder or a .safetensors file; torch_dtype None is float32, as in diffusers.

        A motion adapter or VAE that has been loaded is written to a temporary folder; an id or path is read directly.

        Raises:
            WeightsError: a part cannot be found or used.
            BadParameter: torch_dtype or the scheduler has no equal here.
        """
        base, parts = str(pretrained_model_name_or_path), {"motion_adapter": motion_adapter, "vae": vae}
        with ExitStack() as stack:
            folder = stack.enter_context(temporary_folder())
            settings = {name: inputs.saved(part, folder / name) for name, part in parts.items()}
            settings |= {"name": Path(base).stem, "base": base, "revision": revision}
            settings["dtype"] = inputs.dtype_name(torch_dtype or torch.float32)
            pipeline = cls(build(ModelConfig, settings))
            if scheduler is not None:
                pipeline.scheduler = scheduler
            weakref.finalize(pipeline, stack.pop_all().close)
        return pipeline

    def __call__(
        self,
        image: Any,
        prompt: str | list[str] | None = None,
        strength: float = 1.0,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        motion_scale: int = 0,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: inputs.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> inputs.PIAPipelineOutput | tuple[Any]:
        """The videos of all pictures and prompts, `num_videos_per_prompt` of each. Arguments are those of diffusers.

        Raises:
            RowError: of the first video that could not be made; `BadParameter` names the argument.
        """
        knobs = {**self._knobs, **self._free_init, "strength": strength, "num_frames": num_frames, "eta": eta}
        knobs |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        knobs |= {"motion_scale": motion_scale, "clip_skip": clip_skip, "scheduler": name_of(self._scheduler)}
        knobs |= {"height": height or self._side, "width": width or self._side}
        knobs["lora_scale"] = inputs.lora_scale_of(cross_attention_kwargs)
        reference = None if ip_adapter_image is None else inputs.single_picture(ip_adapter_image, "ip_adapter_image")
        videos = inputs.videos_of(
            {"image": inputs.pictures_of(image), "latents": inputs.arrays_of(latents)}
            | inputs.texts_or_embeds("prompt", prompt, prompt_embeds, default=None)
            | inputs.texts_or_embeds("negative_prompt", negative_prompt, negative_prompt_embeds, default=""),
            generator,
            num_videos_per_prompt,
        )
        for video in videos:
            if video["prompt"] == "":  # a request has a text or its embedding
                video["prompt_embeds"] = self._embedding("", knobs)
        fields = {
            "ip_adapter_image": reference,
            "ip_adapter_image_embeds": inputs.single_embedding(ip_adapter_image_embeds),
            "scheduler_config": dict(self._scheduler.config),
            "on_step_end": inputs.on_step_end(self, callback_on_step_end, callback_on_step_end_tensor_inputs),
        }
        requests = [inputs.request_of(video, knobs, output_type=output_type, **fields) for video in videos]
        outcomes = self._loaded().animate(requests)
        frames = inputs.stacked(outcomes, output_type)
        return inputs.PIAPipelineOutput(frames=frames) if return_dict else (frames,)

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers, at first the checkpoint's own. A new one is used with exactly its settings."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        name_of(scheduler)
        self._scheduler = scheduler

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: inputs.Device = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings of prompts and negative prompts, each [B, L, C]; None for those where there is no guidance."""
        knobs = {**self._knobs, "clip_skip": clip_skip, "lora_scale": 1.0 if lora_scale is None else lora_scale}

        def encoded(text: str | list[str], given: torch.Tensor | None) -> torch.Tensor:
            texts = inputs.texts_of(text, "prompt")
            embeds = [torch.from_numpy(self._embedding(each, knobs)) for each in texts] if given is None else given
            return torch.stack(list(embeds)).to(device).repeat_interleave(num_images_per_prompt, 0)

        positive = encoded(prompt or "", prompt_embeds)
        if not do_classifier_free_guidance:
            return positive, None
        negative = encoded(negative_prompt or "", negative_prompt_embeds)
        return positive, negative if len(negative) == len(positive) else negative[:1].expand_as(positive)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Adds a LoRA, and makes it the active one. `adapter_name` is lower-case letters, digits and . _ -"""
        name = adapter_name or f"default_{len(self._model.loras)}"
        path = inputs.file_of(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        loras = {**self._model.model_dump()["loras"], name: {"path": path, "revision": revision}}
        self._configure(loras=loras)
        self._knobs["lora"] = f"{name}:1"

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: float | list[float] | None = None) -> None:
        """Makes these LoRAs active at these weights, 1 where none is given."""
        self._knobs["lora"] = inputs.lora_choice(adapter_names, adapter_weights, known=self._model.lora_weights)

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs."""
        self._knobs.pop("lora", None)
        self._configure(loras={})

    def load_textual_inversion(
        self, pretrained_model_name_or_path: str | Path, token: str | None = None, *, weight_name: str | None = None
    ) -> None:
        """Adds a textual inversion by its token in prompts."""
        if token is None:
            raise BadParameter("token must be given: the word of prompts that stands for the embedding", "token")
        inversion = {"path": inputs.file_of(pretrained_model_name_or_path, None, weight_name)}
        self._configure(textual_inversions={**self._model.model_dump()["textual_inversions"], token: inversion})

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        subfolder: str | None = None,
        weight_name: str | None = None,
        image_encoder_folder: str | None = "image_encoder",
    ) -> None:
        """Adds an IP-Adapter, a .safetensors file, and its image encoder (None: calls give embeddings)."""
        source, encoder = pretrained_model_name_or_path_or_dict, image_encoder_folder
        if encoder is not None:
            encoder = inputs.file_of(source, None if "/" in encoder else subfolder, encoder)
        self._configure(ip_adapter=inputs.file_of(source, subfolder, weight_name), image_encoder=encoder)

    def set_ip_adapter_scale(self, scale: float) -> None:
        """Sets how much the IP-Adapter's picture counts, 0 to 2."""
        if not isinstance(scale, int | float):
            raise BadParameter(f"scale must be one number for all layers (got {type(scale).__name__})", "scale")
        self._knobs["ip_adapter_scale"] = float(scale)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Lets all later calls run with FreeU."""
        self._knobs["free_u"] = (s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Lets later calls run without FreeU."""
        self._knobs.pop("free_u", None)

    def enable_free_init(
        self,
        num_iters: int = 3,
        use_fast_sampling: bool = False,
        method: str = "butterworth",
        order: int = 4,
        spatial_stop_frequency: float = 0.25,
        temporal_stop_frequency: float = 0.25,
    ) -> None:
        """Lets all later calls run with FreeInit."""
        self._free_init = {"free_init": method, "free_init_iters": num_iters, "free_init_order": order}
        self._free_init |= {"free_init_spatial_stop": spatial_stop_frequency}
        self._free_init |= {"free_init_temporal_stop": temporal_stop_frequency}
        self._free_init |= {"free_init_fast_sampling": use_fast_sampling}

    def disable_free_init(self) -> None:
        """Lets later calls run without FreeInit."""
        self._free_init.clear()

    def enable_vae_slicing(self) -> None:
        """Does nothing, because frames are always decoded in chunks that fit in memory."""

    disable_vae_slicing = enable_vae_slicing

    def enable_vae_tiling(self) -> None:
        """Encodes and decodes pictures of more than 512 px a side in tiles."""
        self._configure(vae_tiling="on")

    def disable_vae_tiling(self) -> None:
        """Encodes and decodes pictures whole."""
        self._configure(vae_tiling="off")

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: inputs.Device = None) -> None:
        """Keeps weights in host memory, and on the GPU only the part that runs."""
        self._configure(offload="model", device=inputs.device_name(device, gpu_id))

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: inputs.Device = None) -> None:
        """Keeps weights in host memory, and on the GPU only the layer that runs."""
        self._configure(offload="sequential", device=inputs.device_name(device, gpu_id))

    def to(self, *args: torch.dtype | inputs.Device, device: inputs.Device = None, dtype: Any = None) -> Self:
        """The pipeline itself, on that device (cpu or cuda) and in that precision."""
        for value in filter(None, (*args, device, dtype)):
            if isinstance(value, torch.dtype):
                self._configure(dtype=inputs.dtype_name(value))
            else:
                self._configure(device=inputs.device_name(value), offload="none")
        return self

    def close(self) -> None:
        """Drops the model; a later call loads it again."""
        self._animator = None
        self._finalizer()

    def _loaded(self) -> Animator:
        if self._animator is None:
            self._animator = Animator(self._model)
            self._finalizer = weakref.finalize(self, self._animator.close)  # a pipeline that is deleted frees the model
        return self._animator

    def _configure(self, **settings: Any) -> None:
        model = build(ModelConfig, {**self._model.model_dump(), **settings})
        if model != self._model:
            self.close()
            self._model = model

    def _embedding(self, text: str, knobs: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        chosen = {name: knobs[name] for name in ("clip_skip", "lora", "lora_scale") if name in knobs}
        return self._loaded().encode_prompt(text, **chosen)
