"""The colour space that a PNG states in cICP, or in gAMA and cHRM, as the ICC profile that browsers would make of it.

Source: PNG, third edition, 4.3: cICP goes before iCCP, iCCP before sRGB, sRGB before gAMA and cHRM.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from PIL import PngImagePlugin

_Curve = Callable[[np.ndarray], np.ndarray]
"""Light, 0 to 1, of samples, 0 to 1."""

_SRGB: Final = (0.3127, 0.3290, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
"""x and y of white, red, green and blue."""
_PRIMARIES: Final = {
    1: _SRGB,
    5: (0.3127, 0.3290, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.3140, 0.3510, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
"""By the code of ITU-T H.273."""
_GAMMA: Final = 0.45455
_NEAR: Final = 0.05
"""A gAMA that differs by less from `_GAMMA` counts as sRGB's, as in libpng."""


def png_profile(image: PngImagePlugin.PngImageFile, content: bytes, notes: list[str]) -> bytes | None:
    """The profile of an opened PNG: its own, or one made of its chunks; None where it is sRGB or says nothing."""
    if (cicp := _cicp(content)) is not None:
        primaries, transfer, matrix, is_full = cicp
        if primaries in _PRIMARIES and transfer in _CURVES and (matrix, is_full) == (0, 1):
            return None if (primaries, transfer) == (1, 13) else _profile(_PRIMARIES[primaries], _CURVES[transfer])
        notes.append("cicp_ignored")
    own: bytes | None = image.info.get("icc_profile")
    if own or "srgb" in image.info:
        return own
    gamma, points = image.info.get("gamma", 0.0), image.info.get("chromaticity", _SRGB)
    if gamma <= 0 or len(points) != 8:
        return None
    if abs(gamma / _GAMMA - 1) < _NEAR and np.allclose(points, _SRGB, atol=0.002):
        return None
    return _profile(points, lambda samples: samples ** (1 / gamma))


def _cicp(content: bytes) -> tuple[int, int, int, int] | None:
    at = 8
    while at + 12 <= len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        if name in (b"IDAT", b"IEND"):
            return None
        if name == b"cICP" and size == 4:
            first, second, third, fourth = content[at + 8 : at + 12]
            return first, second, third, fourth
        at += 12 + size
    return None


def _srgb(samples: np.ndarray) -> np.ndarray:
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


def _bt709(samples: np.ndarray) -> np.ndarray:
    return np.where(samples < 0.081, samples / 4.5, ((samples + 0.099) / 1.099) ** (1 / 0.45))


_CURVES: Final[dict[int, _Curve]] = {
    **dict.fromkeys((1, 6, 14, 15), _bt709),
    4: lambda samples: samples**2.2,
    5: lambda samples: samples**2.8,
    8: lambda samples: samples,
    13: _srgb,
}
"""By the code of ITU-T H.273. PQ and HLG are left out: their light is beyond white."""

_D50: Final = np.array([0.9642, 1.0, 0.8249])
_BRADFORD: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _profile(points: tuple[float, ...], curve: _Curve) -> bytes | None:
    """An ICC profile (version 2, matrix and curves) of these primaries; None where they span no triangle."""
    columns = np.array(
        [[x / y, 1.0, (1 - x - y) / y] if y else [0.0] * 3 for x, y in zip(points[::2], points[1::2], strict=True)]
    ).T
    white, primaries = columns[:, 0], columns[:, 1:]
    if abs(np.linalg.det(primaries)) < 1e-6 or not white.any():
        return None
    to_xyz = primaries * np.linalg.solve(primaries, white)
    gains = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapted = np.linalg.inv(_BRADFORD) @ (gains[:, None] * (_BRADFORD @ to_xyz))
    samples = np.clip(curve(np.linspace(0, 1, 1024)) * 65_535 + 0.5, 0, 65_535).astype(">u2")
    text = b"PNG colour"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + bytes(1 + 78),
        b"cprt": b"text\0\0\0\0" + b"none\0",
        b"wtpt": _xyz(_D50),
        b"rXYZ": _xyz(adapted[:, 0]),
        b"gXYZ": _xyz(adapted[:, 1]),
        b"bXYZ": _xyz(adapted[:, 2]),
        b"rTRC": b"curv\0\0\0\0" + struct.pack(">I", len(samples)) + samples.tobytes(),
    }
    return _icc_file(tags)


def _icc_file(tags: Mapping[bytes, bytes]) -> bytes:
    """The file of a profile with these tags. The last one, the curve of red, is that of green and blue too."""
    at, table, body = 128 + 4 + 12 * (len(tags) + 2), [], b""
    for name, tag in tags.items():
        table.append((name, at + len(body), len(tag)))
        body += tag + bytes(-len(tag) % 4)
    table += [(name, *table[-1][1:]) for name in (b"gTRC", b"bTRC")]
    head = struct.pack(
        ">I4sI4s4s4s12s4s28s",
        at + len(body),
        b"\0" * 4,
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        bytes(12),
        b"acsp",
        bytes(28),
    )
    head += struct.pack(">iii", *(round(value * 65_536) for value in _D50))
    directory = struct.pack(">I", len(table)) + b"".join(struct.pack(">4sII", *entry) for entry in table)
    return head.ljust(128, b"\0") + directory + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(float(value) * 65_536) for value in values))
