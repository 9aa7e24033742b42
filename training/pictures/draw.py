"""Draws the bundled catalogue: pictures of many formats and sizes, and a Parquet and a CSV manifest of the same rows.

`python -m training.pictures.draw [FOLDER]` writes over what is there; the same code draws the same pictures.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from training.pictures import graphics, landscapes, products

CATALOG: Final = Path(__file__).parents[2] / "pia_ray" / "demo" / "catalog"


@dataclass(frozen=True)
class Entry:
    """One row of the manifests, and how its picture is drawn and stored."""

    draw: Callable[[], Image.Image]
    file: str
    prompt: str
    motion_scale: int
    category: str
    sku: int
    price: float
    num_frames: int | None = None
    seed: int | None = None

    @property
    def id(self) -> str:
        """The row's id: the file name without its ending."""
        return Path(self.file).stem

    def row(self) -> dict[str, Any]:
        """The row's cells by column; category, sku and price only pass through to the results."""
        return {
            "id": self.id,
            "image": f"images/{self.file}",
            "prompt": self.prompt,
            "motion_scale": self.motion_scale,
            "num_frames": self.num_frames,
            "seed": self.seed,
            "category": self.category,
            "sku": self.sku,
            "price": self.price,
        }


ENTRIES: Final = (
    Entry(
        landscapes.sunset, "sunset-mountains.jpg", "pan right, mountains at sunset", 2, "landscape", 1001, 14.5, seed=7
    ),
    Entry(landscapes.sailboat, "sailboat.png", "waves, a red boat on the blue sea", 1, "landscape", 1002, 18.0),
    Entry(landscapes.city, "night-city.webp", "flicker, a city at night", 4, "city", 1003, 21.25),
    Entry(landscapes.forest, "forest-path.jpg", "zoom in, a path into a green forest", 1, "landscape", 1004, 16.0),
    Entry(products.mug, "mug.png", "rotate right, a blue mug on white", 1, "product", 2001, 9.9),
    Entry(products.perfume, "perfume.jpg", "zoom out, a pink bottle with a soft shadow", 4, "product", 2002, 59.0),
    Entry(graphics.cat, "cat.webp", "sway, the face of an orange cat", 4, "portrait", 3001, 12.0),
    Entry(
        graphics.portrait, "portrait.jpg", "zoom in, a woman with dark hair", 0, "portrait", 3002, 24.0, seed=2**63 + 1
    ),
    Entry(graphics.flow, "flow.jpg", "rotate left, bands of bright color", 3, "abstract", 4001, 30.0, num_frames=24),
    Entry(graphics.banner, "summer-sale.png", "pan up, a tall poster with circles", 0, "text", 5001, 0.0),
    Entry(landscapes.balloon, "balloon.gif", "pan down, a striped balloon in the blue sky", 1, "landscape", 1005, 11.0),
    Entry(products.candle, "candle.jpg", "flicker, a yellow flame in the dark", 5, "product", 2003, 7.5),
    Entry(landscapes.moon, "moon.png", "pulse, the white moon at night", 4, "landscape", 1006, 8.0, num_frames=8),
    Entry(products.sneaker, "sneaker.webp", "pan left, a blue shoe on yellow", 1, "product", 2004, 89.0, seed=42),
)


def save(image: Image.Image, path: Path) -> None:
    """Writes the picture in the format of its ending. The portrait is stored sideways, as telephones do."""
    match path.suffix:
        case ".jpg" if path.stem == "portrait":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned a quarter clockwise
            image.transpose(Image.Transpose.ROTATE_90).save(path, quality=86, optimize=True, exif=exif.tobytes())
        case ".jpg":
            image.save(path, quality=84, optimize=True)
        case ".webp":
            image.save(path, quality=86, method=6)
        case ".gif":
            image.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
        case _:
            image.save(path, optimize=True)


def draw(folder: Path) -> None:
    """Draws all pictures and writes both manifests into the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        save(entry.draw(), folder / "images" / entry.file)
    rows = [entry.row() for entry in ENTRIES]
    schema = pa.schema(
        {
            "id": pa.string(),
            "image": pa.string(),
            "prompt": pa.string(),
            "motion_scale": pa.int32(),
            "num_frames": pa.int32(),
            "seed": pa.uint64(),
            "category": pa.string(),
            "sku": pa.int64(),
            "price": pa.float64(),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "catalog.parquet")
    with (folder / "catalog.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else CATALOG)
