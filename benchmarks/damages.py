"""Clips of steady motion over still pictures, and twelve damages of them in five strengths; `damage.py` judges them.

All random numbers come from the generator that is passed. Frames are uint8 [T, SIDE, SIDE, 3].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE: Final = 256
NUM_FRAMES: Final = 16
STRENGTHS: Final = 5
MODERATE: Final = 2
"""Index of the strength at which a damage must be told from clean clips."""

WORLD: Final = 1.5
"""Side of the picture under the camera, in views."""

_FINE: Final = 2
"""Samples per pixel along each side, so that a move by parts of a pixel does not blur."""

Array = np.ndarray[Any, Any]
Damage = Callable[["Clip", int, np.random.Generator], Array]


@dataclass(frozen=True)
class Clip:
    """A clean clip, what its damages need, and the picture that it starts from."""

    picture: Image.Image
    frames: Array
    other: Array
    """The same motion over another picture."""
    plain: Array
    """The clip without its letters."""
    letters: Array
    """How much of a pixel is covered by letters, float32 [T, SIDE, SIDE]."""
    motion: str


MOTIONS: Final = ("pan", "rise", "zoom in", "zoom out", "turn", "waves", "sway", "still")

ONE_WAY: Final = ("pan", "rise", "zoom in", "zoom out", "turn")
"""Motions that do not come back by themselves."""


def clip(picture: Image.Image, other: Image.Image, motion: str, draws: np.random.Generator) -> Clip:
    """A clip of that motion, of a random direction and of a half to all of the largest amount."""
    amount = draws.uniform(0.5, 1.0) * draws.choice([-1, 1])
    where = _where(motion, amount)
    world, second = _world(picture), _world(other)
    letters = _letters(draws)
    covered = _sample(letters[..., None], where)[..., 0]  # [T, SIDE, SIDE]
    noise = draws.normal(0, 1.0, (NUM_FRAMES, SIDE, SIDE, 1))  # no video is free of noise
    plain, replaced = _sample(world, where), _sample(second, where)
    lettered = plain + covered[..., None] * (_ink(plain) - plain)
    return Clip(
        picture=Image.fromarray(_rounded(lettered[0])),
        frames=_rounded(lettered + noise),
        other=_rounded(replaced + noise),
        plain=_rounded(plain + noise),
        letters=covered,
        motion=motion,
    )


def flicker(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Each frame is darker or brighter than the last, by random."""
    sigma = (3, 6, 12, 20, 32)[strength]
    return _rounded(clip.frames + draws.normal(0, sigma, (NUM_FRAMES, 1, 1, 1)))


def pumping(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """The brightness goes up and down every six frames."""
    amount = (4, 8, 14, 22, 32)[strength]
    phase = 2 * math.pi * (np.arange(NUM_FRAMES) / 6 + draws.uniform())
    return _rounded(clip.frames + amount * np.sin(phase)[:, None, None, None])


def freeze(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """One frame stays for 3 to 13 frames."""
    length = (2, 4, 6, 9, 12)[strength]
    first = int(draws.integers(0, NUM_FRAMES - length))
    frames = clip.frames.copy()
    frames[first : first + length + 1] = frames[first]
    return frames


def jump_cut(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """The last frames show another picture."""
    length = (2, 4, 6, 9, 12)[strength]
    return np.concatenate([clip.frames[:-length], clip.other[-length:]])


def colour_drift(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """The colours turn warm, cold, green, purple or grey, more with each frame."""
    amount = (0.06, 0.12, 0.2, 0.3, 0.45)[strength]
    has_colour = float(np.ptp(clip.frames[0], axis=-1).mean()) > 8
    kind = int(draws.integers(4 + has_colour))
    grey = np.full((3, 3), 1 / 3)
    ends = [np.diag(gains) for gains in ((1.5, 1, 0.5), (0.5, 1, 1.5), (0.75, 1.5, 0.75), (1.3, 0.6, 1.3))]
    end = [*ends, grey][kind]
    share = amount * np.linspace(0, 1, NUM_FRAMES)[:, None, None]
    matrices = (1 - share) * np.eye(3) + share * end  # [T, 3, 3]
    return _rounded(np.einsum("thwc,tdc->thwd", clip.frames.astype(np.float32), matrices))


def growing_blur(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Each frame is less sharp than the last."""
    radius = (0.6, 1.0, 1.6, 2.6, 4.5)[strength]
    return _each(clip.frames, lambda image, share: image.filter(ImageFilter.GaussianBlur(float(radius * share))))


def growing_noise(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Each frame has more noise than the last."""
    sigma = (4, 8, 14, 24, 40)[strength]
    noise = draws.normal(0, 1, clip.frames.shape) * np.linspace(0, 1, NUM_FRAMES)[:, None, None, None]
    return _rounded(clip.frames + sigma * noise)


def mosaic(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """The later half of the frames are blocks of one colour each."""
    block = (2, 3, 5, 8, 14)[strength]

    def blocks(image: Image.Image, share: float) -> Image.Image:
        if share < 0.5:
            return image
        few = math.ceil(SIDE / block)
        return image.resize((few, few), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.NEAREST)

    return _each(clip.frames, blocks)


def melting(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Things lose their shape: each frame is warped more than the last, by a smooth random field."""
    field = _smooth(draws, (2, SIDE, SIDE), scale=SIDE / 12) * (2, 4, 7, 12, 20)[strength]
    return _melted(clip.frames, field)


def blank_frames(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Some frames are black or white."""
    places = draws.choice(NUM_FRAMES, (1, 2, 3, 5, 8)[strength], replace=False)
    frames = clip.frames.copy()
    frames[places] = draws.choice([0, 255])
    return frames


def wrong_picture(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Another picture shines through all frames, at last alone."""
    share = (0.2, 0.4, 0.6, 0.8, 1.0)[strength]
    return _rounded((1 - share) * clip.frames + share * clip.other.astype(np.float32))


def dissolving_letters(clip: Clip, strength: int, draws: np.random.Generator) -> Array:
    """Letters turn into signs that nobody can read, as sharp as before; all else stays."""
    field = _smooth(draws, (2, SIDE, SIDE), scale=SIDE / 48) * (1, 2, 3.5, 6, 10)[strength]
    covered = _melted(clip.letters[..., None], field)
    plain = clip.plain.astype(np.float32)
    return _rounded(plain + covered * (_ink(plain) - plain))


DAMAGES: Final[dict[str, Damage]] = {
    "flicker": flicker,
    "brightness pumping": pumping,
    "freeze": freeze,
    "jump cut": jump_cut,
    "colour drift": colour_drift,
    "growing blur": growing_blur,
    "growing noise": growing_noise,
    "mosaic": mosaic,
    "melting": melting,
    "black or white frames": blank_frames,
    "wrong picture": wrong_picture,
    "dissolving letters": dissolving_letters,
}


def loops(clip: Clip) -> list[Array]:
    """The clip there and back, which closes, and then with more and more of the way back missing."""
    missing = (0.0, 0.08, 0.16, 0.25, 0.35, 0.5)
    return [clip.frames[_there_and_back(share)] for share in missing]


def _there_and_back(missing: float) -> Array:
    step = np.linspace(0, 2 - missing, NUM_FRAMES)
    places: Array = (np.where(step > 1, 2 - step, step) * (NUM_FRAMES - 1)).round().astype(int)
    return places


def _where(motion: str, amount: float) -> Array:
    """Where each pixel of each frame is in the world, float32 [T, h, w, 2] (x, y) in half views round the middle."""
    size = SIDE * _FINE
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(line, line)
    frames = []
    for step in np.arange(NUM_FRAMES) / (NUM_FRAMES - 1):
        grown = {"zoom in": -abs(amount), "zoom out": abs(amount)}.get(motion, 0.0) * math.log(1.35) * step
        turn = amount * math.radians(12) * step if motion == "turn" else 0.0
        cos, sin = math.cos(turn) * math.exp(grown), math.sin(turn) * math.exp(grown)
        to_x, to_y = cos * x + sin * y, cos * y - sin * x
        to_x = to_x + amount * step * (0.3 if motion == "pan" else 0.0)
        to_y = to_y + amount * step * (0.3 if motion == "rise" else 0.0)
        if motion == "waves":
            to_y = to_y + amount * 0.05 * (np.sin(6 * x + 2 * math.pi * step) - np.sin(6 * x))
        if motion == "sway":
            to_x = to_x + amount * 0.16 * math.sin(2 * math.pi * step) * ((1 - y) / 2) ** 1.3
        frames.append(np.stack([to_x, to_y], -1))
    return np.stack(frames).astype(np.float32)


def _world(picture: Image.Image) -> Array:
    side = round(SIDE * _FINE * WORLD)
    width, height = picture.size
    edge = min(width, height)
    box = ((width - edge) // 2, (height - edge) // 2, (width + edge) // 2, (height + edge) // 2)
    return np.asarray(picture.convert("RGB").crop(box).resize((side, side), Image.Resampling.BICUBIC), np.float32)


def _letters(draws: np.random.Generator) -> Array:
    """Two lines of text somewhere near the middle of a world, float32 [side, side]: 1 where there is ink."""
    side = round(SIDE * _FINE * WORLD)
    image = Image.new("L", (side, side))
    words = ("SALE 50%", "Organic Tea", "COFFEE", "since 1924", "Sunscreen", "FRESH", "No. 5 Paris", "Handmade")
    one, two = draws.choice(words, 2, replace=False)
    size = SIDE * _FINE * draws.uniform(0.08, 0.13)
    place = side * draws.uniform(0.42, 0.58, 2)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).multiline_text(
        tuple(place), f"{one}\n{two}", fill=255, font=font, anchor="mm", align="center"
    )
    return np.asarray(image, np.float32) / 255


def _ink(plain: Array) -> Array:
    """The colour of letters: white, or black over bright pictures."""
    return np.float32(255.0 * (plain[0].mean() < 140))


def _sample(world: Array, where: Array) -> Array:
    """The world at those places, then the mean over each pixel: float32 [T, SIDE, SIDE, channels]."""
    side = len(world)
    place = (where / WORLD + 1) / 2 * side - 0.5
    fine = bilinear(np.broadcast_to(world, (len(where), *world.shape)), place)
    return fine.reshape(len(where), SIDE, _FINE, SIDE, _FINE, -1).mean((2, 4))


def bilinear(images: Array, place: Array) -> Array:
    """Images [T, H, W, channels] at pixel places [T, h, w, 2] (x, y); beyond the edge the nearest pixel."""
    height, width = images.shape[1:3]
    values = []
    for image, at in zip(images, place, strict=True):
        x, y = np.clip(at[..., 0], 0, width - 1.001), np.clip(at[..., 1], 0, height - 1.001)
        left, top = x.astype(np.int32), y.astype(np.int32)
        u, v = ((each - whole.astype(np.float32))[..., None] for each, whole in ((x, left), (y, top)))
        above = image[top, left] * (1 - u) + image[top, left + 1] * u
        below = image[top + 1, left] * (1 - u) + image[top + 1, left + 1] * u
        values.append((above * (1 - v) + below * v).astype(np.float32))
    return np.stack(values)


def _melted(images: Array, field: Array) -> Array:
    """Images [T, SIDE, SIDE, channels] warped by a field [2, SIDE, SIDE] in px that grows with time."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    grown = [np.stack([x + share * field[0], y + share * field[1]], -1) for share in np.linspace(0, 1, NUM_FRAMES)]
    values = bilinear(images, np.stack(grown))
    return _rounded(values) if images.dtype == np.uint8 else values


def _smooth(draws: np.random.Generator, shape: tuple[int, ...], *, scale: float) -> Array:
    """Smooth random fields of that wavelength, of variance 1."""
    few = math.ceil(SIDE / scale)
    noise = draws.normal(0, 1, (shape[0], few, few)).astype(np.float32)
    grown = [Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in noise]
    field = np.stack([np.asarray(each) for each in grown])
    return field / field.std()


def _each(frames: Array, change: Callable[[Image.Image, float], Image.Image]) -> Array:
    shares = np.linspace(0, 1, NUM_FRAMES)
    return np.stack([np.asarray(change(Image.fromarray(f), s)) for f, s in zip(frames, shares, strict=True)])


def _rounded(values: Array) -> Array:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
