"""The demo model's parts: their architectures, the tokenizer, and loading what an earlier training left.

The text encoder follows its tokens by their spelling, so that new words do not cost what the old ones have learnt.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNetMotionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.prompts import words

EMBEDDING: Final = 96
PROMPT_TOKENS: Final = 32
MOST_FRAMES: Final = 32


def make_vae(widths: tuple[int, ...] = (16, 32)) -> Any:
    """An autoencoder that shrinks by 2 to 4 channels; untrained."""
    levels = len(widths)
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def make_unet(widths: tuple[int, ...] = (32, 64, 64, 96)) -> Any:
    """PIA's UNet, small: nine input channels, motion at every level, text and attention where the picture is moved.

    It starts by predicting nothing. Only attention over the latents themselves can move their detail: what comes from
    coarser cells is the same for the four latents of each. It is the upward half's alone, with the fewest layers.
    """
    inner = len(widths) - 2
    unet = UNetMotionModel(
        sample_size=48,
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlockMotion", "DownBlockMotion", *("CrossAttnDownBlockMotion",) * inner),
        up_block_types=("CrossAttnUpBlockMotion",) * len(widths),
        block_out_channels=widths,
        layers_per_block=(0, *(1,) * (len(widths) - 1)),
        norm_num_groups=8,
        cross_attention_dim=EMBEDDING,
        num_attention_heads=(2, *(4,) * (len(widths) - 1)),
        motion_num_attention_heads=4,
        motion_max_seq_length=MOST_FRAMES,
        use_motion_mid_block=True,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def make_scheduler() -> Any:
    """DDIM over v-prediction with zero terminal SNR: the first step already sees pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def make_tokenizer() -> Any:
    """A byte-level CLIP tokenizer in which each of `words()` is one token; unknown words are spelt out."""
    letters = _byte_letters()
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelt for pair in pairwise(word)):
        most = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(most)
        spelt = [_merged(word, most) for word in spelt]
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)])
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def make_text_encoder(tokenizer: Any, width: int = EMBEDDING) -> Any:
    """CLIP's text encoder with two layers; untrained."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_vae(folder: Path) -> Any:
    """The autoencoder of an exported model, in float32."""
    return AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)


def load_unet(folder: Path) -> Any:
    """The UNet of an exported model, in float32."""
    return UNetMotionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)


def load_text_encoder(folder: Path, tokenizer: Any) -> Any:
    """The text encoder of an exported model for another tokenizer.

    A token that both know keeps its embedding; a new one starts as the mean of those that spelt it.
    """
    old = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    spelling = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    new = make_text_encoder(tokenizer, old.config.hidden_size)
    known, table = spelling.get_vocab(), old.get_input_embeddings().weight.detach()
    state = {name: value for name, value in old.state_dict().items() if "token_embedding" not in name}
    new.load_state_dict(state, strict=False)
    rows = new.get_input_embeddings().weight
    with torch.no_grad():
        for token, index in tokenizer.get_vocab().items():
            if token in known:
                rows[index] = table[known[token]]
            else:
                pieces = spelling(token.removesuffix("</w>"), add_special_tokens=False).input_ids
                rows[index] = table[pieces].mean(0)
    return new


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _byte_letters() -> list[str]:
    """A printable letter for every byte, as CLIP's tokenizer has them: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]
