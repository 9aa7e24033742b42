"""A prompt's text -> chunks of tokens with weights, each as long as the text encoder takes.

Long prompts are divided by the rule of A1111's web UI, which ComfyUI shares but for the commas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pia_ray.config.knob_types import PromptSyntax
from pia_ray.config.prompt_syntax import WeightedText, weighted_texts
from pia_ray.pia.components import Components
from pia_ray.pia.loading.textual_inversion import divide

COMMA_TOKENS: Final = 20
"""Most tokens after a comma that go to the next chunk together where a chunk is full. Source: A1111's web UI."""


@dataclass
class TokenChunk:
    """The tokens of one pass of the text encoder, without start, end and padding, and the weight of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def is_weighted(self) -> bool:
        """Whether a weight is not 1."""
        return any(weight != 1 for weight in self.weights)


def chunk_length(components: Components) -> int:
    """Tokens of one pass of the text encoder, start and end included: 77 for Stable Diffusion 1.5."""
    return min(components.tokenizer.model_max_length, components.text_encoder.config.max_position_embeddings)


def chunks_of(text: str, components: Components, *, syntax: PromptSyntax) -> list[TokenChunk]:
    """The chunks of a prompt, at least one. The vectors of a textual inversion are not divided."""
    pieces = weighted_texts(text) if syntax == "a1111" else [WeightedText(text, 1.0)]
    builder = _Chunks(chunk_length(components) - 2, comma=components.tokenizer.convert_tokens_to_ids(",</w>"))
    for piece in pieces:
        if piece.starts_chunk:
            builder.close()
        for part in divide(piece.text, components.inversions):
            if isinstance(part, str):
                for token in components.tokenizer(part, add_special_tokens=False, verbose=False).input_ids:
                    builder.add([token], piece.weight)
            else:
                builder.add(part, piece.weight)
    chunks = builder.chunks
    return chunks if chunks[-1].tokens or len(chunks) == 1 else chunks[:-1]  # nothing follows the last BREAK


class _Chunks:
    """Chunks as they grow."""

    def __init__(self, size: int, *, comma: int | None) -> None:
        self._size = size
        self._comma = comma
        self._after_comma: int | None = None
        """Tokens of the last chunk up to its last comma."""
        self.chunks = [TokenChunk()]

    def close(self) -> None:
        """Starts a new chunk."""
        self.chunks.append(TokenChunk())
        self._after_comma = None

    def add(self, tokens: Sequence[int], weight: float) -> None:
        """Appends tokens that stay together where they fit into one chunk."""
        last, is_comma, at = self.chunks[-1], list(tokens) == [self._comma], self._after_comma
        if len(last.tokens) == self._size and not is_comma and at is not None and self._size - at < COMMA_TOKENS:
            self.close()
            new = self.chunks[-1]
            new.tokens, new.weights = last.tokens[at:], last.weights[at:]
            del last.tokens[at:], last.weights[at:]
        if len(self.chunks[-1].tokens) + len(tokens) > self._size:
            self.close()
        for start in range(0, len(tokens), self._size):
            part = tokens[start : start + self._size]
            if start:
                self.close()
            self.chunks[-1].tokens += part
            self.chunks[-1].weights += [weight] * len(part)
        if is_comma:
            self._after_comma = len(self.chunks[-1].tokens)
