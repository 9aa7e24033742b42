"""Landscapes of the bundled catalogue, each a function without arguments. All drawn here, so free of licences."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.pictures.canvas import Canvas, blur, edge


def sunset() -> Image.Image:
    """Layered mountains before a low sun."""
    c = Canvas(640, 480, seed=11)
    c.paint(c.gradient([(0, "#2b2a5c"), (0.35, "#a8497a"), (0.6, "#f7875b"), (0.75, "#ffd08a")], c.y / c.height))
    c.light("#ffb070", c.glow(410, 265, 230, squeeze=0.7) * 0.8)
    clouds = np.clip((c.noise(90, stretch=4) - 0.52) * 5, 0, 1) * np.clip(1.2 - c.y / 260, 0, 1)
    c.paint("#ffc3a0", clouds * 0.55)
    c.paint("#fff3cf", c.disc(410, 262, 44))
    c.light("#ffe2a8", c.glow(410, 262, 80) * 0.7)
    layers = [
        (300, 120, 210, "#b8577d"),
        (335, 120, 170, "#86406f"),
        (375, 110, 150, "#54305c"),
        (425, 90, 120, "#2a1f42"),
    ]
    for level, height, scale, colour in layers:
        mask = c.ridge(level, height, scale)
        c.paint(colour, mask)
        c.paint("#f9a27a", mask * np.clip((c.y - level + 30) / 160, 0, 1) * 0.16)  # mist in the valleys
    c.vignette(0.35)
    c.grain(0.02)
    return c.image()


def sailboat() -> Image.Image:
    """A red sailing boat on a bright sea."""
    c = Canvas(800, 450, seed=5)
    horizon = 210
    c.paint(c.gradient([(0, "#3d8fd6"), (1, "#d9f1fb")], c.y / horizon))
    clouds = np.clip((c.noise(110, stretch=2.6) - 0.5) * 4.5, 0, 1) * np.clip(c.y / 60, 0, 1)
    c.paint("#ffffff", clouds * np.clip(1.25 - c.y / horizon, 0, 1) * 0.9)
    sea = edge(horizon - c.y)
    depth = np.clip((c.y - horizon) / (c.height - horizon), 0, 1)
    c.paint(c.gradient([(0, "#8fd0de"), (0.25, "#3a9dbd"), (1, "#0b4d7c")], depth), sea)
    swell = np.sin(np.maximum(c.y - horizon, 0) ** 0.62 * 3.4 + c.noise(140, stretch=3, octaves=2) * 9)
    c.paint("#dff7fa", sea * np.clip(swell - 0.72, 0, 1) * 2.2 * (0.25 + 0.5 * depth))
    c.paint("#06406d", sea * np.clip(-swell - 0.55, 0, 1) * 0.55 * depth)
    c.shade(blur(c.box(330, 330, 560, 352, corner=11), 8) * sea, 0.55)
    c.paint("#6b4a33", c.line([(446, 300), (446, 62)], 6))
    sail = c.shape([(456, 76), (480, 140), (540, 232), (580, 278), (456, 286)])
    c.paint(c.gradient([(0, "#ffffff"), (1, "#d9dde6")], (c.x - 450) / 130), sail)
    jib = c.shape([(436, 92), (400, 190), (340, 280), (436, 286)])
    c.paint(c.gradient([(0, "#d2433b"), (1, "#f2705e")], (c.x - 340) / 100), jib)
    hull = c.shape([(318, 298), (600, 298), (560, 345), (356, 345)])
    c.paint(c.gradient([(0, "#e8503f"), (1, "#992a2c")], (c.y - 298) / 47), hull)
    c.paint("#ffffff", c.box(318, 298, 600, 306) * hull)
    foam = np.clip(c.noise(14, octaves=2) * 1.6 - 0.4, 0, 1) * blur(c.box(330, 340, 580, 352, corner=6), 3)
    c.paint("#f5ffff", foam)
    for x, y, span in ((140, 90, 15), (196, 66, 11), (660, 112, 13)):
        c.paint("#33506b", c.curve([(x - span, y - 5), (x - 5, y - 6), (x, y), (x + 5, y - 6), (x + span, y - 5)], 2.4))
    return c.image()


def city() -> Image.Image:
    """A skyline at night with lit windows and their reflection."""
    c = Canvas(480, 640, seed=23)
    c.paint(c.gradient([(0, "#060a24"), (0.45, "#1d2359"), (0.72, "#6a3f84")], c.y / c.height))
    for x, y, bright in c.random.random((140, 3)):
        c.light("#ffffff", c.glow(x * 480, y * 330, 0.8 + bright) * bright)
    c.light("#cdd6ff", c.glow(366, 104, 95) * 0.45)
    c.paint("#f4f1dc", c.disc(366, 104, 38))
    for x, y, radius in ((354, 96, 9), (378, 116, 7), (372, 90, 5)):
        c.paint("#dcd7bd", c.disc(x, y, radius) * 0.8)
    shore = 500
    for far, (colour, lit) in enumerate((("#3a2f6e", "#c79a6f"), ("#231f52", "#ffc46b"), ("#0f1030", "#ffdf8f"))):
        x = -14.0
        while x < 480:
            width = 34 + 30 * c.random.random()
            top = shore - (330 - 70 * far) * (0.35 + 0.65 * c.random.random())
            c.paint(colour, c.box(x, top, x + width, shore))
            if c.random.random() < 0.35:
                c.paint(colour, c.line([(x + width / 2, top), (x + width / 2, top - 34)], 3))
                c.light("#ff4a4a", c.glow(x + width / 2, top - 34, 4))
            windows = np.zeros_like(c.x)
            for left in range(max(0, round(x + 6)), round(x + width - 8), 10):
                for upper in range(round(top + 10), shore - 10, 14):
                    if c.random.random() < 0.42:
                        windows[upper : upper + 8, left : left + 6] = 0.35 + 0.65 * c.random.random()
            c.paint(lit, windows)
            x += width + 2 + 6 * c.random.random()
    c.light("#ffb86b", np.exp(-(((c.y - shore) / 60) ** 2)) * (c.y < shore) * 0.28)
    glints = c.noise(10, stretch=8, octaves=2)
    rows = np.clip((2 * shore - c.y + (glints - 0.5) * 26).astype(int), 0, shore - 1)
    columns = np.clip((c.x + (glints - 0.5) * 16).astype(int), 0, c.width - 1)
    c.paint(c.pixels[rows, columns] * 0.62 + np.array([0.02, 0.03, 0.1]), edge(shore - c.y))
    c.vignette(0.3)
    return c.image()


def forest() -> Image.Image:
    """A path into a misty wood."""
    c = Canvas(576, 720, seed=8)
    c.paint(c.gradient([(0, "#86b59a"), (0.45, "#f3f2c4"), (0.62, "#b9cf8f"), (1, "#39502a")], c.y / c.height))
    c.light("#fffbd6", c.glow(288, 330, 190) * 0.85)
    for far, colour in enumerate(("#a5c49c", "#73a07c", "#43755a", "#1f4a3b", "#0e2a25")):
        near = far / 4
        ground = 400 + 150 * near
        for _ in range(14 - 2 * far):
            side = 1 if c.random.random() < 0.5 else -1
            x = 288 + side * (46 + 120 * near + (300 - 60 * near) * c.random.random())
            width = 5 + 30 * near * (0.7 + 0.6 * c.random.random())
            lean = (c.random.random() - 0.5) * 30
            base = ground + 24 * c.random.random()
            trunk = [(x - width * 0.8, base + 20), (x - width * 0.4, 300), (x + lean - width * 0.3, -10)]
            trunk += [(x + lean + width * 0.3, -10), (x + width * 0.4, 300), (x + width * 0.9, base + 20)]
            c.paint(colour, c.shape(trunk))
        canopy = c.noise(60 + 40 * near) * 1.3 + np.abs(c.x - 288) / 900 - c.y / (250 + 60 * near) - 0.1 + 0.2 * near
        c.paint(colour, np.clip((canopy - 0.42) * 9, 0, 1))
        floor = c.ridge(ground, 18, 90)
        c.paint(colour, floor * 0.8)
        c.light("#fff9cf", c.glow(288, 350, 170 - 20 * far) * (0.34 - 0.07 * far))
    way = np.clip((c.y - 408) / 312, 0, 1)
    middle = 288 + 46 * np.sin(way * 3.6) * (1 - way) + 10 * way
    path = edge(np.abs(c.x - middle) - (7 + 165 * way**1.5)) * edge(408 - c.y)
    dirt = c.gradient([(0, "#f6e9b8"), (0.4, "#c9a86f"), (1, "#6d5033")], way) * (0.8 + 0.4 * c.noise(26))[..., None]
    c.paint(dirt, blur(path, 2.5))
    leaves = np.clip((c.noise(9, octaves=2) - 0.62) * 9, 0, 1) * way
    c.paint("#d98f3c", leaves * 0.5)
    for slant in (-120, -30, 70):
        ray = edge(np.abs(c.x - 288 - (c.y - 60) * slant / 330) - 16 - c.y / 16)
        c.light("#fff7c8", blur(ray, 14) * np.clip(1 - c.y / 620, 0, 1) * 0.2)
    c.vignette(0.4)
    c.grain(0.02)
    return c.image()


def balloon() -> Image.Image:
    """A striped hot-air balloon over hills, in few flat colours."""
    c = Canvas(360, 480, seed=31)
    c.paint(c.gradient([(0, "#5bb8f0"), (1, "#e6f7ff")], c.y / 400))
    for x, y, size in ((70, 120, 30), (104, 128, 24), (40, 132, 20), (290, 230, 26), (318, 238, 20), (262, 240, 18)):
        c.paint("#ffffff", c.disc(x, y, size, squeeze=0.62) * 0.95)
    c.paint("#8fd18a", c.ridge(395, 40, 170))
    c.paint("#5bb56a", c.ridge(430, 40, 120))
    body = c.shape(
        [(180, 60), (262, 92), (286, 168), (250, 240), (206, 288), (154, 288), (110, 240), (74, 168), (98, 92)],
        rounded=True,
    )
    around = (c.x - 180) / np.maximum(1, 106 * np.sqrt(np.clip(1 - ((c.y - 165) / 135) ** 2, 0.02, 1)))
    stripe = np.floor((np.arcsin(np.clip(around, -1, 1)) / np.pi + 0.5) * 7).astype(int) % 3
    for number, colour in enumerate(("#e63946", "#ffd166", "#f4f1de")):
        c.paint(colour, body * (stripe == number))
    c.shade(body * np.clip(around, 0, 1) ** 2, 0.3)
    for x in (158, 202):
        c.paint("#6b4a33", c.line([(x, 286), (180 + (x - 180) * 0.8, 330)], 2))
    c.paint("#8a5a34", c.box(160, 328, 200, 360, corner=5))
    c.paint("#6b4224", c.box(158, 326, 202, 334, corner=3))
    return c.image()


def moon() -> Image.Image:
    """The full moon over dunes in 16-bit grey."""
    c = Canvas(320, 320, seed=19)
    c.paint(c.gradient([(0, "#08080a"), (1, "#4a4a4e")], c.y / 320))
    for x, y, bright in c.random.random((60, 3)):
        c.light("#ffffff", c.glow(x * 320, y * 190, 0.7 + 0.6 * bright) * bright)
    c.light("#ffffff", c.glow(205, 105, 105) * 0.35)
    disc = c.disc(205, 105, 58)
    c.paint("#f2f2f2", disc)
    seas = blur(np.clip((c.noise(40, octaves=3) - 0.5) * 5, 0, 1), 1.5)
    c.shade(disc * seas, 0.35)
    for x, y, radius in ((190, 84, 8), (228, 120, 10), (206, 136, 6), (180, 118, 5)):
        c.shade(disc * edge(np.abs(np.hypot(c.x - x, c.y - y) - radius) - 1.2), 0.2)
    for level, bright in ((225, "#5d5d60"), (258, "#3c3c40"), (292, "#1d1d20")):
        line = level + 16 * np.sin(c.x / 52 + level) + 7 * np.sin(c.x / 23 + level * 2)
        c.paint(bright, edge(line - c.y))
        c.light("#ffffff", np.exp(-np.clip(c.y - line, 0, None) / 7) * edge(line - c.y) * 0.3)
    grey = (np.clip(c.pixels.mean(axis=-1), 0, 1) * 65_535 + 0.5).astype(np.uint16)  # [H, W]
    return Image.fromarray(grey)
