"""What prompts say: the motions and their synonyms, scenes, and the words of the tokenizer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Final

from training.draws import Draws
from training.worlds import LANDSCAPE, LEAVES, TEXTURE

PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "pan left": ("pan left", "camera pans left", "the camera moves left", "panning left", "camera pan to the left"),
    "pan right": (
        "pan right",
        "camera pans right",
        "the camera moves right",
        "panning right",
        "camera pan to the right",
    ),
    "pan up": ("pan up", "camera pans up", "the camera moves up", "tilt up", "panning up", "camera rises"),
    "pan down": ("pan down", "camera pans down", "the camera moves down", "tilt down", "panning down"),
    "zoom in": ("zoom in", "camera zooms in", "slow zoom in", "the camera moves closer", "zooming in"),
    "zoom out": ("zoom out", "camera zooms out", "slow zoom out", "the camera moves away", "zooming out"),
    "rotate left": ("rotate left", "camera rolls left", "turn counterclockwise", "rotating counterclockwise"),
    "rotate right": ("rotate right", "camera rolls right", "turn clockwise", "rotating clockwise"),
    "sway": ("sway", "swaying in the wind", "wind", "trees sway in the wind", "swaying gently"),
    "waves": ("waves", "rippling water", "water waves", "ripples", "waves on the water", "sea waves"),
    "flicker": ("flicker", "twinkle", "flickering light", "light twinkles", "brightness flickers"),
    "pulse": ("pulse", "heartbeat", "pulsing", "breathing", "beating"),
    "still": ("still", "no motion", "static", "nothing moves"),
}
"""Every motion with the phrases that ask for it."""

MOTIONS: Final = tuple(PHRASES)

SCENES: Final[dict[int, tuple[str, ...]]] = {
    LEAVES: (
        *("colorful shapes", "leaves", "an abstract scene", "a photo", "a picture", "objects", "a cat", "a flower"),
        *("a person", "a portrait", "a red ball", "a blue square", "a white bird", "an orange fish", "a house"),
    ),
    TEXTURE: ("a texture", "a pattern", "an abstract background", "a photo", "the sand", "rain"),
    LANDSCAPE: (
        *("a landscape", "mountains", "hills", "a landscape at sunset", "mountains and sky", "nature", "a lake"),
        *("sea and sky", "a photo", "a beautiful landscape", "a forest", "the moon at night", "a boat on the river"),
    ),
}
"""By kind of world. Scenes say nothing of the motion: the model learns to pass over them."""

OTHER_WORDS: Final = (
    "a the of in on at with and to is , . up down left right highly detailed best quality "
    "red green blue yellow white black orange purple pink cyan ball square diamond ring "
    "moves moving goes flies bounces bouncing gentle fast slow motion video animation water sky cloud clouds "
    "tree trees sun moon night day dog man woman girl boy boat car bird fish house city forest river beach sand snow "
    "rain fire smoke wind hair smile eyes light"
)
"""Further words with a token of their own."""


def prompt(motion: str, kind: int, draws: Draws) -> str:
    """A prompt for the motion; often with a scene, now and then with a word that means nothing."""
    text = draws.one_of(PHRASES[motion])
    if draws.happens(0.5):
        scene = draws.one_of(SCENES[kind])
        text = draws.one_of((f"{scene}, {text}", f"{text}, {scene}", f"{scene} {text}"))
    if draws.happens(0.15):
        unknown = "".join(draws.words.choices(string.ascii_lowercase, k=draws.words.randint(2, 8)))
        text = draws.one_of((f"{unknown}, {text}", f"{text}, {unknown}", f"{text} {unknown}"))
    return text


def words() -> list[str]:
    """All words with a token of their own, in order."""
    phrases: Sequence[str] = [phrase for group in (*PHRASES.values(), *SCENES.values()) for phrase in group]
    found = {word.replace(",", "") for text in (*phrases, OTHER_WORDS) for word in text.split()}
    return sorted(found - {""})
