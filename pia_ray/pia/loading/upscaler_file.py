"""The file of an upscaler -> its network, by spandrel, which knows ESRGAN, its successors and many others.

Source: spandrel, github.com/chaiNNer-org/spandrel; it is the extra `upscale`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from pia_ray import extras
from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line
from pia_ray.pia.loading.checkpoint_tensors import read_tensors
from pia_ray.pia.upscaler import Upscaler

_WRAPPERS: Final = ("params_ema.", "params-ema.", "params.", "model_state_dict.", "state_dict.", "net.")
"""Prefixes that trainers put before the names of all tensors; of several, the first is taken."""


def read_upscaler(path: Path, device: torch.device) -> Upscaler:
    """The upscaler in a .safetensors or pickled file, in half precision on a GPU where its architecture bears that.

    Raises:
        ConfigError: the extra `upscale` is not installed.
        WeightsError: the file holds no network that enlarges RGB pictures.
    """
    found = _network(path)
    channels = found.input_channels, found.output_channels
    if channels != (3, 3) or found.scale < 2:
        raise WeightsError(
            f"the upscaler {path} is a {found.architecture.name} of scale {found.scale} from {channels[0]} to "
            f"{channels[1]} channels: take one that enlarges RGB pictures, such as Real-ESRGAN"
        )
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.float16 if found.supports_half else torch.bfloat16 if found.supports_bfloat16 else dtype
    found.model.requires_grad_(False).eval().to(device, dtype)
    return Upscaler(_AsModule(found), found.scale, found.architecture.name, device, dtype)


class _AsModule(torch.nn.Module):
    """A descriptor of spandrel, which pads to the sizes that its network takes, as a module."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model = descriptor.model
        self._descriptor = descriptor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The enlarged pixels."""
        enlarged: torch.Tensor = self._descriptor(pixels)
        return enlarged


def _network(path: Path) -> Any:
    """The network as spandrel describes it."""
    extras.require("upscale", purpose="an upscaler")
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError, canonicalize_state_dict
    except (ImportError, RuntimeError) as error:  # torchvision, which it imports, raises both
        raise WeightsError(f"spandrel cannot be imported, which reads the upscaler: {error}") from error
    tensors = _unwrapped(read_tensors(path))
    try:
        found = ModelLoader(device="cpu").load_from_state_dict(canonicalize_state_dict(tensors))
    except UnsupportedModelError:
        found = None
    except (KeyError, ValueError, RuntimeError, AssertionError, TypeError, IndexError) as error:
        raise WeightsError(f"the upscaler {path} is incomplete or damaged: {first_line(error)}") from error
    if not isinstance(found, ImageModelDescriptor):
        raise WeightsError(
            f"the upscaler {path} holds no network that spandrel knows as one that enlarges pictures: its tensors are "
            f"{', '.join(sorted(tensors)[:3]) or 'none'}, ..."
        )
    return found


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without the name of the wrapper that their trainer has put them in."""
    for wrapper in _WRAPPERS:
        inside = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items() if name.startswith(wrapper)}
        if inside:
            return inside
    return tensors
