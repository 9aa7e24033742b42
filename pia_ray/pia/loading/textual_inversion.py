"""Textual inversions -> new words of a model's prompts: vectors in its text encoder, with their ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.components import Components, sharing_copy
from pia_ray.pia.loading.checkpoint_tensors import is_finite, read_tensors, tensor_names

BUNDLED: Final = "bundle_emb."
"""Start of the keys of textual inversions in a LoRA file: `bundle_emb.TOKEN.string_to_param.*`, as A1111 reads them."""


def with_inversions(components: Components, files: Mapping[str, Path], *, loras: Iterable[Path] = ()) -> Components:
    """The model with a word for each file, by name, and for each inversion that a LoRA's file holds.

    A file of several vectors also gives the words `x_1`, `x_2`, ... A word of `files` goes before a LoRA's.

    It has its own text encoder; all weights but the token embeddings stay shared with the original, and the tokenizer
    stays the same. Source: textual inversion, arXiv 2208.01618.

    Raises:
        WeightsError: a file is not a textual inversion, or not for this model; a token is already in the vocabulary.
    """
    sources = {token: (path, read_tensors(path)) for token, path in files.items()}
    for lora in loras:
        sources = {token: (lora, tensors) for token, tensors in bundled(lora).items()} | sources
    if not sources:
        return components
    text_encoder = sharing_copy(components.text_encoder)
    embeddings = text_encoder.get_input_embeddings()
    table, vocabulary = embeddings.weight, components.tokenizer.get_vocab()
    words: dict[str, tuple[int, ...]] = {}
    added: list[torch.Tensor] = []
    first = max(len(table), len(components.tokenizer))
    for token, (path, tensors) in sources.items():
        vectors = _vectors(tensors, path, width=table.shape[1])
        ids = tuple(range(first + len(added), first + len(added) + len(vectors)))
        names = {token: ids} | {f"{token}_{index}": (ids[index],) for index in range(1, len(ids))}
        for name in names:
            if (name in vocabulary and token in files) or name in words:
                raise WeightsError(f"{path}: {name} is already a token of this model; choose another one for it")
        words |= names
        added.extend(vectors.to(table.device, table.dtype))
    grown = torch.cat([table, table.new_zeros(first - len(table), table.shape[1]), torch.stack(added)])
    embeddings.weight = torch.nn.Parameter(grown, requires_grad=False)
    embeddings.num_embeddings = text_encoder.config.vocab_size = len(grown)
    return replace(components, text_encoder=text_encoder, inversions=words)


def divide(text: str, inversions: Mapping[str, tuple[int, ...]]) -> Iterator[str | tuple[int, ...]]:
    """The text between the words of inversions, and the tokens of each; case is ignored, the longest word counts.

    A word is whole: where it begins or ends with a letter or digit, no letter, digit or _ stands next to it.
    """
    known = {word.lower(): ids for word, ids in inversions.items()}
    words = tuple(sorted(known, key=len, reverse=True))
    end = 0
    for found in _pattern(words).finditer(text) if words else ():
        yield text[end : found.start()]
        assert found.lastindex is not None
        # Not by the text found, because a letter may have several small ones: an s also matches the long s.
        yield known[words[found.lastindex - 1]]
        end = found.end()
    yield text[end:]


@lru_cache(maxsize=16)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"({_whole(word)})" for word in words), re.IGNORECASE)


def _whole(word: str) -> str:
    before, after = (r"(?<!\w)" if _is_letter(word[0]) else ""), (r"(?!\w)" if _is_letter(word[-1]) else r"(?!_\d)")
    return f"{before}{re.escape(word)}{after}"


def _is_letter(char: str) -> bool:
    """Whether the character is one of a word's."""
    return char.isalnum() or char == "_"


def bundled(lora: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each inversion in a LoRA's file, by token."""
    if not any(name.startswith(BUNDLED) for name in tensor_names(lora)):
        return {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(lora).items():
        token, _, key = name.removeprefix(BUNDLED).partition(".")
        if name.startswith(BUNDLED) and key:
            found.setdefault(token, {})[key] = tensor
    return found


def _vectors(tensors: Mapping[str, torch.Tensor], path: Path, *, width: int) -> torch.Tensor:
    """[vectors, width]"""
    vectors = tensors.get("string_to_param.*")  # A1111's pickled layout
    if vectors is None and len(tensors) == 1:  # diffusers' layout, or A1111's emb_params
        vectors = next(iter(tensors.values()))
    if vectors is None or vectors.ndim not in (1, 2):
        raise WeightsError(
            f"{path} is not a textual inversion of Stable Diffusion 1.5: it holds {', '.join(sorted(tensors)[:3])}"
        )
    if vectors.shape[-1] != width:
        raise WeightsError(
            f"{path} was made for another model: its vectors have {vectors.shape[-1]} numbers, this text encoder's "
            f"{width}. PIA takes textual inversions of Stable Diffusion 1.5."
        )
    if vectors.numel() == 0 or not is_finite(vectors):
        raise WeightsError(f"{path} is damaged: it holds no vector, or NaN or infinite values. Fetch it again.")
    return vectors.reshape(-1, width)
