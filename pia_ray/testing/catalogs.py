"""Catalogues of drawn pictures with a manifest, some damaged where asked for."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

ManifestFormat = Literal["parquet", "csv", "tsv", "jsonl"]


def make_catalog(
    folder: Path,
    *,
    rows: int,
    seed: int = 0,
    broken: float = 0.0,
    sizes: Sequence[tuple[int, int]] = ((96, 64), (64, 96), (64, 64)),
    format: ManifestFormat = "parquet",  # noqa: A002  # the field's word
) -> Path:
    """Draws pictures, no two alike, writes a manifest that names them, and returns the manifest's path.

    Of the rows, the share `broken` (0 to 1, rounded) has a picture that is truncated, a web page, or missing, by
    turns; which rows is drawn from `seed`. Sizes are (width, height) in px, by turns. Columns: id, image, prompt,
    motion_scale, seed and sku, a column that is no knob and passes through.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    damaged = {int(row): place for place, row in enumerate(rng.permutation(rows)[: round(rows * broken)])}
    records: list[dict[str, Any]] = []
    for row in range(rows):
        extension = ("jpg", "png", "webp")[row % 3]
        name = f"images/{row:06d}.{extension}"
        content = draw_picture(sizes[row % len(sizes)], seed=int(rng.integers(2**32)), extension=extension)
        kind = ("truncated", "html", "missing")[damaged[row] % 3] if row in damaged else ""
        if kind == "truncated":
            content = content[: len(content) // 2]
        elif kind == "html":
            content = b"<!doctype html><title>404</title><p>This picture is no longer here.</p>\n"
        if kind != "missing":
            (folder / name).write_bytes(content)
        records.append(
            {
                "id": f"item-{row:06d}",
                "image": name,
                "prompt": f"picture {row} of the catalogue, gentle motion",
                "motion_scale": row % 3,
                "seed": int(rng.integers(2**63)),
                "sku": f"SKU{row:05d}",
            }
        )
    return _write_manifest(folder / f"manifest.{format}", records, format)


def put_catalog(uri: str, *, rows: int, seed: int = 0, broken: float = 0.0, format: ManifestFormat = "parquet") -> str:  # noqa: A002
    """As `make_catalog`, in a local folder or below an s3:// prefix; the URI of the manifest, which comes last."""
    from pia_ray import storage

    if not storage.is_s3(uri):
        return str(make_catalog(storage.local_path(uri), rows=rows, seed=seed, broken=broken, format=format))
    with tempfile.TemporaryDirectory(prefix="pia-ray-") as folder:
        manifest = make_catalog(Path(folder), rows=rows, seed=seed, broken=broken, format=format)
        for path in (*sorted((manifest.parent / "images").iterdir()), manifest):
            storage.upload_file(path, storage.join(uri, path.relative_to(manifest.parent).as_posix()))
    return storage.join(uri, manifest.name)


def draw_picture(size: tuple[int, int], *, seed: int, extension: Literal["jpg", "png", "webp"] | str = "png") -> bytes:
    """The bytes of a picture file of (width, height) px: a gradient with discs, drawn from the seed."""
    from PIL import Image

    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]  # each [H, W]
    slope = (x / width + y / height)[..., None] / 2  # [H, W, 1], 0 to 1
    pixels = rng.uniform(0, 255, 3) * (1 - slope) + rng.uniform(0, 255, 3) * slope  # [H, W, 3]
    for _ in range(4):
        across, down, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.1, 0.3) * min(size)
        pixels[(x - across) ** 2 + (y - down) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return stream.getvalue()


def _write_manifest(path: Path, records: list[dict[str, Any]], kind: ManifestFormat) -> Path:
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        fields = {
            "id": text,
            "image": text,
            "prompt": text,
            "motion_scale": pa.int8(),
            "seed": pa.uint64(),
            "sku": text,
        }
        pq.write_table(pa.Table.from_pylist(records, pa.schema(fields)), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            columns = ["id", "image", "prompt", "motion_scale", "seed", "sku"]
            writer = csv.DictWriter(stream, columns, delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path
