"""Textual inversions -> new words of a model's prompts: vectors in its text encoder, tokens in its tokenizer."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.components import Components
from pia_ray.pia.loading.checkpoint_tensors import read_tensors, sharing_copy


def with_inversions(components: Components, files: Mapping[str, Path]) -> Components:
    """The model with a token for each file, by name. A file of several vectors takes as many tokens: `x`, `x_1`, ...

    It has its own text encoder and tokenizer; all weights but the token embeddings stay shared with the original.
    Source: textual inversion, arXiv 2208.01618.

    Raises:
        WeightsError: a file is not a textual inversion, or not for this model; a token is already in the vocabulary.
    """
    tokenizer, text_encoder = copy.deepcopy(components.tokenizer), sharing_copy(components.text_encoder)
    words = text_encoder.get_input_embeddings()
    table, vocabulary = words.weight, tokenizer.get_vocab()
    num_vectors, added = {}, {}
    for token, path in files.items():
        vectors = _read_vectors(path, width=table.shape[1])
        num_vectors[token] = len(vectors)
        for index, vector in enumerate(vectors):
            name = f"{token}_{index}" if index else token
            if name in vocabulary or name in added:
                raise WeightsError(f"{path}: {name} is already a token of this model; choose another one for it")
            tokenizer.add_tokens(name)
            added[name] = vector.to(table.device, table.dtype)
    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in added}
    rows = max(len(table), *(token_id + 1 for token_id in ids.values()))
    grown = torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])
    for name, token_id in ids.items():
        grown[token_id] = added[name]
    words.weight = torch.nn.Parameter(grown, requires_grad=False)
    words.num_embeddings = text_encoder.config.vocab_size = rows
    return replace(components, text_encoder=text_encoder, tokenizer=tokenizer, inversions=num_vectors)


def expand(text: str, inversions: Mapping[str, int]) -> str:
    """The prompt with all tokens of an inversion of several vectors, where it has the first; case is ignored."""
    if not inversions:
        return text
    known = {token.lower(): token for token in inversions}
    longest_first = sorted(known, key=len, reverse=True)
    pattern = f"(?:{'|'.join(map(re.escape, longest_first))})(?!_\\d)"

    def all_vectors(found: re.Match[str]) -> str:
        token = known[found[0].lower()]
        return " ".join([token, *(f"{token}_{index}" for index in range(1, inversions[token]))])

    return re.sub(pattern, all_vectors, text, flags=re.IGNORECASE)


def _read_vectors(path: Path, *, width: int) -> torch.Tensor:
    """[vectors, width]"""
    tensors = read_tensors(path)
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
    return vectors.reshape(-1, width)
