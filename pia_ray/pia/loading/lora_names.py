"""Keys of LoRA files -> the module of the model that each names, and its role there.

Reads the names of kohya's trainer, LyCORIS, peft, diffusers, AnimateDiff and the original Stable Diffusion code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from pia_ray.pia.components import Changeable, Part

Target = tuple[Part, str]
"""A module: its part and its flat name."""

_ROLE: Final = re.compile(
    r"(?P<name>.+?)(?:(?:[._]lora(?:_linear_layer)?)?\.(?P<alpha>alpha)"
    r"|[._]lora(?:_linear_layer)?[._](?P<factor>down|up|mid|A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.default(?:_\d+)?)?(?:\.weight)?"
    r"|\.(?P<other>dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff(?:_b)?|[wb]_norm))"
)
_WRAPPERS: Final = re.compile(r"^(?:base_model_model_|module_|model_diffusion_model_|diffusion_model_)+")
_PREFIXES: Final[Mapping[str, Part]] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet_": "unet",
    "text_encoder_": "text_encoder",
    "text_model_": "text_encoder",
}
_ALIASES: Final = {
    "_processor": "",  # diffusers' older names
    "text_model_": "",  # a level of CLIPTextModel that transformers 5.6 dropped
    "self_attn_to_out": "self_attn_out_proj",
    "self_attn_to_q": "self_attn_q_proj",
    "self_attn_to_k": "self_attn_k_proj",
    "self_attn_to_v": "self_attn_v_proj",
    "temporal_transformer_": "",  # AnimateDiff's own names
    "attention_blocks_0": "attn1",
    "attention_blocks_1": "attn2",
}
_RESNET: Final = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER: Final = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}


def role_of(key: str) -> tuple[str, str] | None:
    """The name of the module in a key, and the tensor's role: down, up, mid, alpha, diff, ...; None for other keys."""
    found = _ROLE.fullmatch(key)
    if found is None:
        return None
    factor = {"A": "down", "B": "up"}.get(found["factor"] or "", found["factor"])
    role = found["alpha"] or factor or found["magnitude"] or found["other"]
    return found["name"], str(role)


def target_of(name: str, layers_per_block: Sequence[int]) -> Target:
    """The part a name belongs to, and its flat form, in which all writers of LoRAs agree.

    `layers_per_block` is that of the UNet's downward blocks, by which the original code numbers its modules.
    """
    flat = _WRAPPERS.sub("", name.replace(".", "_"))
    part: Part = "unet"
    for prefix, owner in _PREFIXES.items():
        if flat.startswith(prefix):
            flat, part = _WRAPPERS.sub("", flat.removeprefix(prefix)), owner
            break
    if part == "unet":
        flat = _from_original(flat, layers_per_block)
    for alias, ours in _ALIASES.items():
        flat = flat.replace(alias, ours)
    return part, f"{flat}_0" if flat.endswith("_to_out") else flat


def targets_in(components: Changeable) -> Iterator[tuple[Target, str]]:
    """The modules of a model that a LoRA may change, and the dotted name of each."""
    parts: tuple[tuple[Part, Any], ...] = (("unet", components.unet), ("text_encoder", components.text_encoder))
    for part, model in parts:
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor) and not isinstance(module, torch.nn.Embedding):
                yield (part, name.replace(".", "_").replace("text_model_", "")), name


def _from_original(flat: str, layers: Sequence[int]) -> str:
    """diffusers' flat name of a UNet's module for that of the original code; other names as they are."""
    if flat in _OUTER:
        return _OUTER[flat]
    found = re.fullmatch(r"(?:(input|output)_blocks_(\d+)|middle_block)_(\d+)_(.+)", flat)
    if found is None:
        return flat
    side, index, place, rest = found[1], int(found[2] or 0), int(found[3]), found[4]
    if side is None:
        owner = ("mid_block_resnets_0", "mid_block_attentions_0", "mid_block_resnets_1")[min(place, 2)]
    elif side == "input":
        block, layer = _block_and_layer(index - 1, layers)
        if rest == "op":
            return f"down_blocks_{block}_downsamplers_0_conv"
        owner = f"down_blocks_{block}_{('resnets', 'attentions')[min(place, 1)]}_{layer}"
    else:
        block, layer = _block_and_layer(index, layers[::-1])
        if rest == "conv":
            return f"up_blocks_{block}_upsamplers_0_conv"
        owner = f"up_blocks_{block}_{('resnets', 'attentions')[min(place, 1)]}_{layer}"
    return f"{owner}_{_RESNET.get(rest, rest)}"


def _block_and_layer(index: int, layers: Sequence[int]) -> tuple[int, int]:
    """Where a module is by its place among all; each block has one more than its layers, the one that resizes."""
    for block, count in enumerate(layers):
        if index <= count:
            return block, index
        index -= count + 1
    return len(layers), index  # behind the last block, so in no model
