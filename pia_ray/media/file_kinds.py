"""The kind of a file by its first bytes."""

from __future__ import annotations

from typing import Final


def sniff(content: bytes) -> str:
    """The kind of the content by its first bytes, in words: "JPEG", "a web page (HTML)", "an empty file" ..."""
    if not content:
        return "an empty file"
    if content[:4] == b"RIFF":
        return "WebP" if content[8:12] == b"WEBP" else "a RIFF file (audio or video)"
    if content[4:8] == b"ftyp":
        brand = content[8:12]
        if brand in (b"mif1", b"msf1"):  # any kind of image inside; the compatible brands say which
            others = content[16 : min(256, int.from_bytes(content[:4], "big"))]
            brand = next((other for other in _AVIF_BRANDS if other in others), brand)
        return "AVIF" if brand in _AVIF_BRANDS else "HEIC" if brand in _HEIC_BRANDS else "a video (MP4 or MOV)"
    for magic, kind in _MAGIC:
        if content.startswith(magic):
            return kind
    text = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page (HTML)"
    if text.startswith((b"<svg", b"<?xml", b"<!--")):
        return "SVG" if b"<svg" in text else "a web page (HTML)" if b"<html" in text else "XML text"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return "text" if text and all(byte in _TEXT_BYTES for byte in text) else "a file of unknown kind"


_MAGIC: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0\x10\0\0\0CR", "a camera raw file (CR2)"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\1\0", "a Windows icon"),
    (b"\x1aE\xdf\xa3", "a video (WebM or MKV)"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)

_HEIC_BRANDS: Final = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})

_TEXT_BYTES: Final = frozenset(range(32, 127)) | {9, 10, 12, 13} | frozenset(range(128, 256))
