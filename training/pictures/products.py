"""Products of the bundled catalogue, each a function without arguments. All drawn here, so free of licences."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.pictures.canvas import Canvas, blur, edge, rgb


def mug() -> Image.Image:
    """A mug with steam, cut out: everything around it is transparent."""
    c = Canvas(512, 512, "#e9f2f2")
    handle = edge(np.abs(np.hypot(c.x - 352, (c.y - 300) / 1.12) - 62) - 17)
    body = c.shape([(136, 178), (372, 178), (352, 420), (318, 438), (190, 438), (156, 420)])
    body = np.maximum(body, c.disc(254, 426, 78, squeeze=0.28))
    rim = c.disc(254, 178, 118, squeeze=0.24)
    c.paint(c.gradient([(0, "#0f6f78"), (0.5, "#1f9aa0"), (1, "#0b4f5a")], (c.x - 290) / 130), handle)
    around = np.clip((c.x - 136) / 236, 0, 1)
    glaze = [(0, "#0d5f69"), (0.18, "#27a7ab"), (0.32, "#7be0d8"), (0.45, "#2bb0b1"), (1, "#0a4a55")]
    c.paint(c.gradient(glaze, around), body)
    star = [
        (254 + r * np.sin(a), 312 - r * np.cos(a)) for a, r in zip(np.arange(10) * np.pi / 5, [50, 22] * 5, strict=True)
    ]
    c.paint("#ffe9b0", c.shape(star))
    c.shade(c.box(130, 390, 380, 450) * body * np.clip((c.y - 390) / 60, 0, 1), 0.35)
    c.paint("#bff3ec", rim)
    c.paint("#0c5862", c.disc(254, 179, 109, squeeze=0.22))
    c.paint(c.gradient([(0, "#3a1f14"), (1, "#7d4a2c")], (c.x - 150) / 210), c.disc(254, 186, 101, squeeze=0.2) * rim)
    c.paint("#c58f5e", edge(np.abs(np.hypot(c.x - 254, (c.y - 186) / 0.2) - 92) - 3) * 0.5)
    steam = np.zeros_like(c.x)
    for x, lift in ((208, 0), (254, -22), (302, 4)):
        wisp = [(x, 158 + lift), (x + 20, 122 + lift), (x - 16, 84 + lift), (x + 12, 44 + lift)]
        fade = np.clip((c.y - 30) / 70, 0, 1) * np.clip((172 - c.y) / 40, 0, 1)
        steam = np.maximum(steam, blur(c.curve(wisp, 15), 6) * fade * 0.9)
    solid = np.maximum.reduce([handle, body, rim])
    c.pixels = np.where((solid > 0)[..., None], c.pixels, rgb("#dfe8ea"))
    return c.image(np.maximum(solid, steam * (1 - solid)))


def perfume() -> Image.Image:
    """A bottle of perfume with a soft shadow."""
    c = Canvas(600, 800, seed=3)
    c.paint(c.gradient([(0, "#f7d9d0"), (0.62, "#f3c3bb"), (0.7, "#e2a6a2"), (1, "#f0bfb5")], c.y / c.height))
    c.light("#fff4ea", c.glow(210, 200, 330) * 0.6)
    c.shade(blur(c.disc(360, 690, 210, squeeze=0.13), 22), 0.5)
    c.shade(blur(c.disc(300, 684, 150, squeeze=0.08), 7), 0.55)
    bottle = c.box(165, 330, 435, 690, corner=38)
    glass = [(0, "#b85f6c"), (0.12, "#ffd3cb"), (0.28, "#f09aa0"), (0.72, "#d7717f"), (0.9, "#ffc2bd"), (1, "#994553")]
    c.paint(c.gradient(glass, (c.x - 165) / 270), bottle)
    liquid = c.box(190, 425, 410, 668, corner=24)
    amber = c.gradient([(0, "#f7b267"), (0.5, "#f79d65"), (1, "#d9604a")], (c.y - 425) / 243)
    c.paint(amber, liquid * 0.82)
    c.light("#fff6df", c.box(205, 350, 232, 655, corner=13) * 0.6)
    c.light("#fff6df", c.box(398, 360, 406, 650, corner=4) * 0.45)
    c.light("#ffe9c4", c.glow(300, 650, 120, squeeze=0.25) * liquid * 0.7)
    c.paint("#fff7ef", c.box(232, 490, 368, 600, corner=4) * 0.92)
    c.paint("#8b3f48", c.text("PIA", 300, 535, 38))
    c.paint("#b5727a", c.text("eau de parfum", 300, 572, 15))
    metal = c.gradient(
        [(0, "#7a5a2e"), (0.2, "#f8e6b0"), (0.45, "#c79a4e"), (0.8, "#fbedc2"), (1, "#6f4f26")], (c.x - 262) / 76
    )
    c.paint(metal, c.box(268, 288, 332, 336, corner=4))
    cap = c.box(236, 150, 364, 292, corner=14)
    c.paint(c.gradient([(0, "#1d1c26"), (0.2, "#5b5866"), (0.4, "#2a2833"), (1, "#0e0d14")], (c.x - 236) / 128), cap)
    c.light("#ffffff", c.box(252, 164, 262, 280, corner=5) * 0.35)
    for x, y, radius in ((95, 640, 26), (130, 672, 18), (70, 684, 14)):
        c.shade(blur(c.disc(x + 12, y + radius, radius * 1.2, squeeze=0.3), 6), 0.3)
        c.paint(
            c.gradient([(0, "#ffe3dd"), (1, "#d98389")], np.hypot(c.x - x + 8, c.y - y + 8) / radius / 1.6),
            c.disc(x, y, radius),
        )
    c.grain(0.012)
    return c.image()


def candle() -> Image.Image:
    """A candle in the dark."""
    c = Canvas(400, 600, "#140d12", seed=13)
    c.light("#ff9a3c", c.glow(200, 220, 230) * 0.62)
    c.light("#ffcf7a", c.glow(200, 215, 95) * 0.6)
    c.paint("#2a1512", edge(520 - c.y))
    c.light("#ff9a3c", c.glow(200, 540, 190, squeeze=0.2) * edge(520 - c.y) * 0.5)
    wax = np.maximum(c.box(138, 305, 262, 535, corner=8), c.disc(200, 533, 62, squeeze=0.25))
    c.paint(c.gradient([(0, "#8d4a2f"), (0.35, "#ffdca8"), (0.6, "#f5b877"), (1, "#6f3423")], (c.x - 138) / 124), wax)
    c.shade(wax * np.clip((c.y - 330) / 220, 0, 1), 0.6)
    c.paint("#ffe7bd", c.disc(200, 306, 62, squeeze=0.24))
    c.paint("#f2b36b", c.disc(200, 308, 46, squeeze=0.2))
    c.paint("#ffe3b3", c.line([(158, 308), (157, 372)], 14))
    c.paint("#ffd9a0", c.line([(236, 308), (238, 346)], 12))
    c.paint("#2b1a14", c.line([(200, 308), (202, 268)], 4))
    flame = c.shape([(200, 118), (226, 190), (234, 240), (200, 284), (166, 240), (176, 188)], rounded=True)
    c.light("#ffb347", blur(flame, 16))
    c.paint(
        c.gradient([(0, "#ff8a1f"), (0.4, "#ffd34d"), (0.8, "#fff3b0"), (1, "#7fb4ff")], (c.y - 118) / 166),
        blur(flame, 2),
    )
    core = c.shape([(200, 190), (214, 232), (214, 258), (200, 274), (186, 258), (187, 230)], rounded=True)
    c.paint("#fffbe6", blur(core, 3))
    c.grain(0.02)
    return c.image()


def sneaker() -> Image.Image:
    """A running shoe on a coloured backdrop."""
    c = Canvas(720, 420, seed=37)
    c.paint(c.gradient([(0, "#fbd65f"), (1, "#f5a742")], np.hypot(c.x - 330, c.y - 150) / 520))
    c.paint("#ffe696", c.disc(350, 200, 170) * 0.6)
    c.shade(blur(c.disc(370, 352, 270, squeeze=0.07), 10), 0.55)
    upper = c.shape(
        [
            (120, 128),
            (186, 112),
            (226, 146),
            (300, 150),
            (352, 120),
            (420, 168),
            (500, 214),
            (590, 236),
            (630, 276),
            (626, 312),
            (110, 312),
            (100, 220),
        ],
        rounded=True,
    )
    c.paint(c.gradient([(0, "#3f63e8"), (0.6, "#2742b8"), (1, "#1a2c86")], (c.y - 110) / 200), upper)
    knit = 0.5 + 0.5 * np.sin(c.x * 0.9) * np.sin(c.y * 0.9)
    c.light("#9fb4ff", upper * knit * 0.12)
    c.paint("#1a2555", c.shape([(132, 134), (184, 122), (222, 156), (200, 178), (150, 172)], rounded=True))
    c.paint("#ff5a4f", c.shape([(98, 236), (160, 214), (176, 312), (108, 312)], rounded=True) * upper)
    toe = c.shape([(528, 232), (600, 246), (640, 300), (620, 316), (510, 316)], rounded=True)
    c.paint("#2f4fd0", toe * upper)
    for x in (316, 348, 380, 412):
        c.paint("#ffffff", c.line([(x - 4, 152 + (x - 316) * 0.46), (x + 36, 182 + (x - 316) * 0.42)], 8))
    for x in (250, 296, 342):
        c.paint("#ffffff", c.line([(x, 214), (x + 30, 246), (x - 6, 282)], 13) * upper)
    c.light("#ffffff", blur(c.curve([(430, 186), (500, 224), (590, 250)], 8), 4) * upper * 0.6)
    sole = c.shape(
        [(92, 300), (360, 306), (640, 296), (656, 322), (630, 352), (360, 356), (110, 352), (86, 330)], rounded=True
    )
    c.paint(c.gradient([(0, "#ffffff"), (1, "#cfd6e4")], (c.y - 296) / 60), sole)
    c.paint("#ff5a4f", sole * edge(338 - c.y) * 0.9)
    for x in range(110, 640, 22):
        c.shade(c.box(x, 344, x + 6, 360) * sole, 0.35)
    return c.image()
