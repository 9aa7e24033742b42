"""A small drawing kit on numpy: gradients, smooth shapes by distance, value noise, soft light. Colours are floats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Plane = np.ndarray[Any, np.dtype[np.float64]]
"""One number per pixel, [H, W]: a mask from 0 to 1, a distance in px, or a coordinate."""
Colour = str | Plane
"""#rrggbb, or one colour per pixel, [H, W, 3]."""


def rgb(colour: Colour) -> Plane:
    """The colour as floats from 0 to 1, [3] or [H, W, 3]."""
    if isinstance(colour, str):
        return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return colour


class Canvas:
    """A picture in the making; every method that draws returns nothing and paints over what is there."""

    def __init__(self, width: int, height: int, background: Colour = "#000000", *, seed: int = 0) -> None:
        self.width, self.height = width, height
        self.y, self.x = np.mgrid[0:height, 0:width] + 0.5  # [H, W] each, px
        self.pixels = np.broadcast_to(rgb(background), (height, width, 3)).copy()  # [H, W, 3]
        self.random = np.random.default_rng(seed)

    def paint(self, colour: Colour, mask: Plane | float = 1.0) -> None:
        """The colour over the picture where the mask is 1."""
        cover = np.broadcast_to(mask, (self.height, self.width))[..., None]
        self.pixels += (rgb(colour) - self.pixels) * cover

    def light(self, colour: Colour, mask: Plane) -> None:
        """Added light, as from a lamp: bright parts do not overflow."""
        self.pixels = 1 - (1 - self.pixels) * (1 - rgb(colour) * np.clip(mask, 0, 1)[..., None])

    def shade(self, mask: Plane, strength: float) -> None:
        """Darkens where the mask is 1."""
        self.pixels *= 1 - np.clip(mask, 0, 1)[..., None] * strength

    def gradient(self, stops: Sequence[tuple[float, str]], place: Plane) -> Plane:
        """Colours [H, W, 3] between the stops (place, colour), for a place per pixel."""
        at = [stop for stop, _ in stops]
        colours = np.array([rgb(colour) for _, colour in stops])
        return np.stack([np.interp(place, at, colours[:, channel]) for channel in range(3)], axis=-1)

    def noise(self, scale: float, *, octaves: int = 4, stretch: float = 1.0) -> Plane:
        """Smooth noise around 0.5, with features of `scale` px, wider than high by `stretch`."""
        total, weight = np.zeros((self.height, self.width)), 0.0
        for octave in range(octaves):
            step = scale / 2**octave
            rows, columns = int(self.height / step) + 3, int(self.width / (step * stretch)) + 3
            coarse = Image.fromarray(self.random.random((rows, columns)).astype(np.float32))
            total += np.asarray(coarse.resize((self.width, self.height), Image.Resampling.BICUBIC)) / 2**octave
            weight += 1 / 2**octave
        return total / weight

    def ridge(self, level: float, height: float, scale: float) -> Plane:
        """A mask of everything below a mountain line around `level` px from the top."""
        line, places = np.zeros(self.width), np.arange(self.width)
        for octave in range(6):
            knots = np.arange(-1, int(self.width / (scale / 2**octave)) + 3)
            line += np.interp(places / (scale / 2**octave), knots, self.random.random(len(knots)) - 0.5) / 2**octave
        return edge(level - height * line - self.y)

    def disc(self, x: float, y: float, radius: float, *, squeeze: float = 1.0) -> Plane:
        """A mask of a disc, or of an ellipse that is `squeeze` times as high as wide."""
        return edge(np.hypot(self.x - x, (self.y - y) / squeeze) - radius)

    def glow(self, x: float, y: float, radius: float, *, squeeze: float = 1.0) -> Plane:
        """A soft spot of light, at half its strength at about 0.83 of the radius."""
        spot: Plane = np.exp(-(((self.x - x) / radius) ** 2) - ((self.y - y) / (radius * squeeze)) ** 2)
        return spot

    def box(self, left: float, top: float, right: float, bottom: float, *, corner: float = 0.0) -> Plane:
        """A mask of a rectangle with round corners."""
        across = np.abs(self.x - (left + right) / 2) - (right - left) / 2 + corner
        down = np.abs(self.y - (top + bottom) / 2) - (bottom - top) / 2 + corner
        outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
        return edge(outside + np.minimum(np.maximum(across, down), 0) - corner)

    def line(self, points: Sequence[tuple[float, float]], width: float) -> Plane:
        """A mask of a line through the points, with round ends."""
        distance = np.full((self.height, self.width), np.inf)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            near = self._around((x0, x1), (y0, y1), width / 2 + 1)
            x, y, dx, dy = self.x[near] - x0, self.y[near] - y0, x1 - x0, y1 - y0
            along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            distance[near] = np.minimum(distance[near], np.hypot(x - along * dx, y - along * dy))
        return edge(distance - width / 2)

    def _around(self, x: tuple[float, float], y: tuple[float, float], margin: float) -> tuple[slice, slice]:
        """The pixels of a rectangle with a margin in px."""
        rows, columns = (slice(max(0, int(min(ends) - margin)), max(0, int(max(ends) + margin) + 1)) for ends in (y, x))
        return rows, columns

    def curve(self, points: Sequence[tuple[float, float]], width: float) -> Plane:
        """A mask of a smooth line through the points."""
        return self.line(smooth(points, closed=False), width)

    def shape(self, points: Sequence[tuple[float, float]], *, rounded: bool = False) -> Plane:
        """A mask of a polygon, or of a smooth closed curve through the points."""
        drawn = Image.new("L", (self.width * 4, self.height * 4))
        outline = smooth(points, closed=True) if rounded else points
        ImageDraw.Draw(drawn).polygon([(x * 4, y * 4) for x, y in outline], fill=255)
        return np.asarray(drawn.resize((self.width, self.height), Image.Resampling.BOX)) / 255.0

    def text(self, words: str, x: float, y: float, size: float) -> Plane:
        """A mask of words centred at (x, y), in the font that Pillow brings along."""
        drawn = Image.new("L", (self.width, self.height))
        ImageDraw.Draw(drawn).text((x, y), words, fill=255, font=ImageFont.load_default(size), anchor="mm")
        return np.asarray(drawn) / 255.0

    def grain(self, strength: float) -> None:
        """Fine film grain."""
        self.pixels += (self.random.random((self.height, self.width, 1)) - 0.5) * strength

    def vignette(self, strength: float) -> None:
        """Darker corners."""
        away = np.hypot(self.x / self.width - 0.5, self.y / self.height - 0.5) / 0.707
        self.shade(away**2.5, strength)

    def image(self, alpha: Plane | None = None) -> Image.Image:
        """The picture as 8-bit RGB, or RGBA if there is a mask for it."""
        pixels = self.pixels if alpha is None else np.dstack([self.pixels, alpha])
        return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def edge(distance: Plane) -> Plane:
    """A mask of where the distance is negative, smooth over one pixel."""
    return np.clip(0.5 - distance, 0, 1)


def blur(mask: Plane, radius: float) -> Plane:
    """The mask, blurred."""
    grey = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(radius))) / 255.0


def smooth(points: Sequence[tuple[float, float]], *, closed: bool) -> list[tuple[float, float]]:
    """Points of a Catmull-Rom curve through the points."""
    count = len(points)
    out = []
    for index in range(count if closed else count - 1):
        if closed:
            knots = [points[(index + shift) % count] for shift in (-1, 0, 1, 2)]
        else:
            knots = [points[min(max(index + shift, 0), count - 1)] for shift in (-1, 0, 1, 2)]
        p0, p1, p2, p3 = (np.array(knot, dtype=float) for knot in knots)
        for t in np.linspace(0, 1, 12, endpoint=False):
            spot = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2)
            spot += 0.5 * (3 * p1 - p0 - 3 * p2 + p3) * t**3
            out.append((float(spot[0]), float(spot[1])))
    return out if closed else [*out, points[-1]]
