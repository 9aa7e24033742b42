"""Faces, an abstract picture and a poster of the bundled catalogue, each a function without arguments."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.pictures.canvas import Canvas, blur, edge


def cat() -> Image.Image:
    """The face of an orange cat."""
    c = Canvas(512, 512, seed=17)
    c.paint(c.gradient([(0, "#6fc3c9"), (1, "#2f7f95")], np.hypot(c.x - 256, c.y - 210) / 360))
    c.shade(blur(c.disc(256, 520, 190, squeeze=0.6), 18), 0.3)
    fur = c.gradient([(0, "#ffb65c"), (0.6, "#f2923c"), (1, "#c96a25")], np.hypot(c.x - 240, c.y - 240) / 240)
    c.paint(fur, c.disc(256, 540, 170, squeeze=0.75))
    for side in (-1, 1):
        ear = c.shape([(256 + side * 52, 168), (256 + side * 165, 62), (256 + side * 176, 232)])
        c.paint(fur, blur(ear, 2))
        c.paint("#f7b7a3", blur(c.shape([(256 + side * 86, 168), (256 + side * 148, 98), (256 + side * 156, 205)]), 2))
    head = c.shape(
        [
            (256, 120),
            (370, 160),
            (430, 270),
            (400, 370),
            (320, 424),
            (256, 434),
            (192, 424),
            (112, 370),
            (82, 270),
            (142, 160),
        ],
        rounded=True,
    )
    c.paint(fur, head)
    stripes = [[(256, 128), (256, 186)], [(214, 136), (222, 184)], [(298, 136), (290, 184)]]
    stripes += [[(92, 290), (142, 296)], [(100, 336), (146, 328)], [(420, 290), (370, 296)], [(412, 336), (366, 328)]]
    for stripe in stripes:
        c.paint("#a8521d", c.line(stripe, 14) * head * 0.85)
    c.paint("#fff3e0", blur(np.maximum(c.disc(216, 362, 62, squeeze=0.8), c.disc(296, 362, 62, squeeze=0.8)), 4) * head)
    for side in (-1, 1):
        x = 256 + side * 78
        c.paint("#3a1f12", c.disc(x, 268, 49, squeeze=0.95))
        c.paint(
            c.gradient([(0, "#f4ff9a"), (0.6, "#8ed04b"), (1, "#3e8a36")], np.hypot(c.x - x, c.y - 276) / 46),
            c.disc(x, 268, 44, squeeze=0.95),
        )
        c.paint("#10160f", c.disc(x, 268, 17, squeeze=2.2))
        c.paint("#ffffff", c.disc(x - 14, 250, 11))
        c.paint("#ffffff", c.disc(x + 12, 288, 5) * 0.8)
        for fan in (-16, 0, 16):
            whisker = [
                (256 + side * 60, 362 + fan * 0.5),
                (256 + side * 130, 352 + fan),
                (256 + side * 214, 356 + fan * 2),
            ]
            c.paint("#ffffff", c.curve(whisker, 2.6) * 0.9)
        c.paint("#6b3316", c.curve([(256, 362), (256 + side * 12, 384), (256 + side * 36, 382)], 5))
    c.paint("#e2706f", c.shape([(234, 330), (278, 330), (270, 350), (256, 360), (242, 350)], rounded=True))
    c.light("#ffffff", c.glow(250, 337, 8) * 0.6)
    c.grain(0.012)
    return c.image()


def portrait() -> Image.Image:
    """A person with dark hair before a round window."""
    c = Canvas(480, 640, seed=29)
    c.paint(c.gradient([(0, "#f4c95d"), (1, "#e58f4e")], c.y / c.height))
    c.paint(c.gradient([(0, "#fff0c2"), (1, "#f8d98b")], c.y / 460), c.disc(240, 250, 205))
    hair = c.shape(
        [
            (240, 84),
            (340, 118),
            (378, 230),
            (392, 380),
            (416, 500),
            (340, 540),
            (140, 540),
            (64, 500),
            (88, 380),
            (102, 230),
            (140, 118),
        ],
        rounded=True,
    )
    c.paint(c.gradient([(0, "#4a2b3f"), (1, "#1f1426")], c.y / 540), hair)
    coat = c.shape([(240, 468), (330, 486), (430, 540), (470, 660), (10, 660), (50, 540), (150, 486)], rounded=True)
    c.paint(c.gradient([(0, "#2f8f83"), (1, "#155f63")], (c.y - 460) / 180), coat)
    skin = c.gradient([(0, "#f9cda6"), (0.6, "#eab085"), (1, "#c98560")], np.hypot(c.x - 205, c.y - 260) / 230)
    c.paint(skin, c.box(200, 380, 280, 510, corner=36))
    c.paint("#bd7a57", blur(c.disc(240, 420, 58, squeeze=0.5), 8) * c.box(200, 380, 280, 510, corner=36) * 0.8)
    face = c.shape(
        [
            (240, 140),
            (314, 172),
            (334, 260),
            (312, 350),
            (270, 408),
            (240, 418),
            (210, 408),
            (168, 350),
            (146, 260),
            (166, 172),
        ],
        rounded=True,
    )
    c.paint(skin, face)
    fringe = c.shape(
        [
            (240, 96),
            (330, 130),
            (352, 260),
            (322, 232),
            (300, 182),
            (236, 196),
            (176, 214),
            (148, 262),
            (130, 240),
            (150, 130),
        ],
        rounded=True,
    )
    c.paint(c.gradient([(0, "#563349"), (1, "#2a1a2e")], (c.y - 96) / 160), fringe)
    c.light("#ffcf9a", blur(c.curve([(170, 170), (215, 138), (275, 130)], 9), 5) * 0.35)
    for side in (-1, 1):
        x = 240 + side * 42
        c.paint("#ffffff", c.disc(x, 276, 19, squeeze=0.6))
        c.paint("#4c6b3c", c.disc(x + 1, 276, 11))
        c.paint("#15100f", c.disc(x + 1, 276, 5.5))
        c.paint("#ffffff", c.disc(x - 3, 272, 3))
        c.paint("#2a1a2e", c.curve([(x - 21, 275), (x, 262), (x + 21, 275)], 4.5))
        c.paint("#3b2233", c.curve([(x - 24, 246), (x, 238), (x + 24, 246)], 6))
        c.light("#ff7a6a", c.glow(240 + side * 60, 326, 26) * 0.35)
        c.paint("#f2d06b", c.disc(240 + side * 96, 352, 10))
    c.paint("#b06a4b", c.curve([(244, 284), (250, 326), (238, 333)], 4) * 0.8)
    c.paint("#c2444e", c.shape([(206, 366), (228, 358), (240, 362), (252, 358), (274, 366), (240, 384)], rounded=True))
    c.paint("#8d2b38", c.curve([(208, 366), (240, 371), (272, 366)], 2.5))
    c.paint("#f7efe0", c.shape([(200, 480), (240, 560), (280, 480), (310, 500), (240, 620), (170, 500)]))
    c.grain(0.015)
    return c.image()


def flow() -> Image.Image:
    """Bands of colour around a bright core."""
    c = Canvas(900, 600, seed=41)
    u, v = c.x - 470, c.y - 300
    turn = np.arctan2(v, u) + 2.4 * np.exp(-np.hypot(u, v) / 260) + (c.noise(260, octaves=2) - 0.5) * 1.6
    away = np.hypot(u, v) / 430
    stops = [(0, "#1b1464"), (0.2, "#5f2eea"), (0.4, "#ff3d81"), (0.6, "#ff9f45"), (0.8, "#29d3c3"), (1, "#1b1464")]
    c.paint(c.gradient(stops, (turn * 3 / (2 * np.pi) + away) % 1))
    ribs = 0.5 + 0.5 * np.cos(turn * 21 + away * 9)
    c.shade(ribs**3, 0.35)
    c.light("#ffffff", (1 - ribs) ** 9 * 0.35)
    c.light("#fff3d0", c.glow(470, 300, 120) * 0.95)
    c.vignette(0.7)
    return c.image()


def banner() -> Image.Image:
    """A tall poster with words."""
    c = Canvas(300, 900, seed=2)
    c.paint(c.gradient([(0, "#ff6f59"), (0.5, "#f94f7b"), (1, "#7b2d8b")], c.y / c.height))
    for ring in range(7):
        c.paint("#ffd166", edge(np.abs(np.hypot(c.x - 150, c.y - 640) - 34 - ring * 42) - 9) * (0.85 - 0.11 * ring))
    c.paint("#ffe29a", c.disc(150, 640, 34))
    c.shade(blur(c.box(24, 66, 276, 404, corner=18), 12) * 0.6, 0.5)
    c.paint("#fff8ec", c.box(24, 60, 276, 398, corner=18))
    for words, y, size, colour in (
        ("SUMMER", 128, 56, "#f94f7b"),
        ("SALE", 205, 88, "#2b1b45"),
        ("-50%", 300, 84, "#ff6f59"),
        ("until Sunday", 366, 26, "#7b2d8b"),
    ):
        c.paint(colour, c.text(words, 150, y, size))
    c.paint("#fff8ec", c.text("pia-ray", 150, 850, 34))
    return c.image()
