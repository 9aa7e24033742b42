"""The kinds and names of LoRAs that trainers write: merged weights equal to those computed by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components, Lora
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.lora import read_lora, variant
from pia_ray.pia.loading.lora_names import target_of
from pia_ray.testing import make_lora, make_pipeline_folder
from pia_ray.weights import resolve

LINEAR: Final = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV: Final = "down_blocks.0.resnets.0.conv1"
NORM: Final = "down_blocks.0.resnets.0.norm1"
R: Final = 3
ALPHA: Final = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("tiny") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def components(folder: Path) -> Components:
    model = ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16)
    return assemble(resolve(model), model)


def drawn(*shape: int) -> torch.Tensor:
    drawn.seed += 1  # type: ignore[attr-defined]
    return torch.from_numpy(np.random.default_rng(drawn.seed).normal(size=shape).astype(np.float32))  # type: ignore[attr-defined]


drawn.seed = 0  # type: ignore[attr-defined]


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def weights_with(components: Components, tensors: dict[str, torch.Tensor], file: Path, weight: float = 1.0) -> Any:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file)
    parts = replace(components, loras={"x": Lora(file, weight)})
    return variant(parts, (("x", weight),)).unet.state_dict()


def assert_changed(components: Components, ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Exactly the expected differences."""
    for name, before in components.unet.state_dict().items():
        if name in expected:
            torch.testing.assert_close(ours[name], before + expected[name].reshape(before.shape), rtol=1e-4, atol=1e-5)
            assert not torch.equal(ours[name], before)
        else:
            assert torch.equal(ours[name], before), name


def product_of(left: torch.Tensor, core: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A Tucker product, number by number of the kernel: left [r, out], core [r, r, k, k], right [r, in]."""
    kernel = [[left.T @ core[:, :, row, column] @ right for column in range(3)] for row in range(3)]
    return torch.stack([torch.stack(line, -1) for line in kernel], -2)


def kinds(components: Components) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For each kind the tensors of one layer by role, and the difference by hand."""
    out, inner = components.unet.get_submodule(LINEAR).weight.shape  # type: ignore[union-attr, misc]
    cout, cin = components.unet.get_submodule(CONV).weight.shape[:2]  # type: ignore[union-attr]
    alpha, scale = torch.tensor(ALPHA), ALPHA / R
    a, b, c, d = drawn(out, R), drawn(R, inner), drawn(out, R), drawn(R, inner)
    up, mid, down = drawn(cout, R, 1, 1), drawn(R, R, 3, 3), drawn(R, cin, 1, 1)
    t1, t2, ha, hb = drawn(R, R, 3, 3), drawn(R, R, 3, 3), drawn(R, cout), drawn(R, cin)
    k1, ka, kb = drawn(2, 4), drawn(out // 2, R), drawn(R, inner // 4)
    c1, c2 = drawn(2, 2), drawn(cout // 2, cin // 2, 3, 3)
    full, bias, whole = drawn(out, inner), drawn(cout), drawn(cout, cin, 3, 3)
    kron = torch.stack([torch.cat([k1[i, j] * (ka @ kb) for j in range(4)], 1) for i in range(2)]).flatten(0, 1)
    big = torch.zeros(cout, cin, 3, 3)
    for i in range(2):
        for j in range(2):
            big[i * cout // 2 : (i + 1) * cout // 2, j * cin // 2 : (j + 1) * cin // 2] = c1[i, j] * c2
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha}
    tucker = {"hada_t1": t1, "hada_w1_a": ha, "hada_w1_b": hb, "hada_t2": t2, "hada_w2_a": ha, "hada_w2_b": hb}
    both = product_of(ha, t1, hb) * product_of(ha, t2, hb)
    middle = product_of(up.flatten(1).T, mid, down.flatten(1))
    return {
        "LoHa": (loha, {LINEAR: (a @ b) * (c @ d) * scale}),
        "LoHa, Tucker": ({**tucker, "alpha": alpha}, {CONV: both * scale}),
        "LoCon, Tucker": (
            {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": alpha},
            {CONV: middle * scale},
        ),
        "LoKr": ({"lokr_w1": k1, "lokr_w2_a": ka, "lokr_w2_b": kb, "alpha": alpha}, {LINEAR: kron * scale}),
        "LoKr, whole": ({"lokr_w1": c1, "lokr_w2": c2, "alpha": alpha}, {CONV: big}),
        "full": ({"diff": full}, {LINEAR: full}),
        "full with bias": ({"diff": whole, "diff_b": bias}, {CONV: whole, f"{CONV}.bias": bias}),
        "norm": ({"w_norm": bias, "b_norm": 2 * bias}, {NORM: bias, f"{NORM}.bias": 2 * bias}),
    }


@pytest.mark.parametrize(
    "kind",
    ["LoHa", "LoHa, Tucker", "LoCon, Tucker", "LoKr", "LoKr, whole", "full", "full with bias", "norm"],
)
def test_each_kind_is_merged_as_by_hand(components: Components, kind: str, tmp_path: Path) -> None:
    roles, changes = kinds(components)[kind]
    layer = next(iter(changes))
    ours = weights_with(
        components, {f"{kohya(layer)}.{role}": value for role, value in roles.items()}, tmp_path / "x.safetensors"
    )
    expected = {name if name.endswith(".bias") else f"{name}.weight": change for name, change in changes.items()}
    assert_changed(components, ours, expected)


@pytest.mark.parametrize("magnitude", ["dora_scale", "dora_scale of inputs", "lora_magnitude_vector.weight"])
def test_dora_gives_the_merged_weight_its_own_magnitudes(
    components: Components, magnitude: str, tmp_path: Path
) -> None:
    weight = components.unet.get_submodule(LINEAR).weight.detach()  # type: ignore[union-attr]
    up, down = drawn(len(weight), R), drawn(R, weight.shape[1])
    merged = weight + up @ down * (ALPHA / R)
    if magnitude == "dora_scale of inputs":
        size = drawn(1, weight.shape[1]).abs()
        expected = torch.stack([size[0, i] * column / column.norm() for i, column in enumerate(merged.T)]).T
    else:
        size = drawn(len(weight)).abs()
        expected = torch.stack([size[i] * row / row.norm() for i, row in enumerate(merged)])
        size = size[:, None] if magnitude == "dora_scale" else size
    if magnitude.startswith("lora"):
        name = f"base_model.model.{LINEAR}"
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    else:
        name = kohya(LINEAR)
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    tensors[f"{name}.{magnitude.split()[0]}"] = size
    for weight_of_lora in (1.0, 0.5):
        ours = weights_with(components, tensors, tmp_path / "x.safetensors", weight_of_lora)
        assert_changed(components, ours, {f"{LINEAR}.weight": weight_of_lora * (expected - weight)})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (f"base_model.model.{LINEAR}", LINEAR),
        (f"module.{LINEAR}", LINEAR),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k", LINEAR),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", LINEAR),
        ("lora_unet_input_blocks_1_0_in_layers_2", CONV),
        ("lora_unet_input_blocks_2_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("lora_unet_output_blocks_2_0_skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_output_blocks_3_1_proj_in", "up_blocks.1.attentions.1.proj_in"),
        ("lora_unet_output_blocks_1_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_time_embed_2", "time_embedding.linear_2"),
        ("lora_unet_out_2", "conv_out"),
    ],
)
def test_a_layers_other_names_mean_the_same(components: Components, name: str, module: str, tmp_path: Path) -> None:
    weight = components.unet.get_submodule(module).weight.detach()  # type: ignore[union-attr]
    up, down = drawn(len(weight), R, *[1] * (weight.ndim - 2)), drawn(R, *weight.shape[1:])
    dot = "." if "." in name else "_"
    keys = ("lora_A", "lora_B") if dot == "." else ("lora_down", "lora_up")
    tensors = {f"{name}.{keys[0]}.weight": down, f"{name}.{keys[1]}.weight": up}
    ours = weights_with(components, tensors, tmp_path / "x.safetensors")
    assert_changed(components, ours, {f"{module}.weight": up.flatten(1) @ down.flatten(1)})


def test_a_difference_for_four_channels_goes_to_the_first_four_of_nine(components: Components, tmp_path: Path) -> None:
    width = len(components.unet.conv_in.weight)
    up, down = drawn(width, R, 1, 1), drawn(R, 4, 3, 3)
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    ours = weights_with(components, tensors, tmp_path / "x.safetensors")
    expected = torch.zeros_like(components.unet.conv_in.weight)
    expected[:, :4] = (up.flatten(1) @ down.flatten(1)).reshape(width, 4, 3, 3)
    assert_changed(components, ours, {"conv_in.weight": expected})


def test_layers_that_the_model_has_not_are_counted_and_named_and_the_others_merged(
    folder: Path, components: Components, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    whole = load_file(make_lora(tmp_path / "whole.safetensors", folder))
    more = {**whole, "lora_unet_nowhere.lora_down.weight": drawn(2, 2), "lora_unet_nowhere.lora_up.weight": drawn(2, 2)}
    save_file(more, tmp_path / "more.safetensors")
    found = read_lora(tmp_path / "more.safetensors", components)
    assert found.unread == ["lora_unet_nowhere"]
    plain = weights_with(components, whole, tmp_path / "a.safetensors")
    for name, tensor in weights_with(components, more, tmp_path / "b.safetensors").items():
        assert torch.equal(tensor, plain[name])
    loras = {"x": str(tmp_path / "more.safetensors")}
    model = ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, loras=loras)
    with caplog.at_level(logging.WARNING):
        assemble(resolve(model), model)
    assert f"LoRA x: left out: 1 of {found.num_layers} layers, without a place in this model" in caplog.text
    assert "lora_unet_nowhere" in caplog.text


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("input_blocks_1_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_2_1_proj_in", "down_blocks_1_attentions_0_proj_in"),
        ("input_blocks_4_0_op", "down_blocks_1_downsamplers_0_conv"),
        ("input_blocks_5_0_in_layers_2", "down_blocks_2_resnets_0_conv1"),
        ("output_blocks_2_0_in_layers_2", "up_blocks_0_resnets_2_conv1"),
        ("output_blocks_4_1_proj_in", "up_blocks_1_attentions_1_proj_in"),
        ("output_blocks_6_0_in_layers_2", "up_blocks_2_resnets_0_conv1"),
    ],
)
def test_the_original_codes_numbers_follow_the_layers_of_each_block(original: str, ours: str) -> None:
    assert target_of(f"lora_unet_{original}", (0, 2, 2)) == ("unet", ours)
