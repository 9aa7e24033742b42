"""Small catalogues in the forms that people have, each written by a function; docs/manifest.md says who writes them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import openpyxl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from pia_ray.testing import draw_picture


@dataclass(frozen=True)
class Catalogue:
    """A catalogue in a folder, and what is to be made of it."""

    write: Callable[[Path], object]
    prompts: Sequence[str]
    """Of the work items, in order."""
    manifests: tuple[str, ...] = ("m.csv",)
    """Names below the folder; an empty one is the folder itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)


@cache
def picture(extension: str = "jpg") -> bytes:
    return draw_picture((64, 64), seed=1, extension=extension)


def draw(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        extension = path.suffix[1:].lower()
        path.write_bytes(picture({"jpeg": "jpg", "": "jpg"}.get(extension, extension)))


def table(rows: Sequence[Sequence[Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


def shopify(folder: Path) -> None:
    draw(folder, "files/a.jpg", "files/b.jpg", "files/c.png")
    header = ["Handle", "Title", "Body (HTML)", "Vendor", "Variant SKU", "Image Src", "Image Position", "Status"]
    rows = [
        ["shirt", "Red Shirt", "<p>Soft.</p>", "Acme", "S", "files/a.jpg", "1", "active"],
        ["shirt", "", "", "", "M", "files/b.jpg", "2", ""],
        ["shirt", "", "", "", "L", "", "", ""],
        ["mug", "Mug", "", "Acme", "U", "files/c.png", "1", "active"],
    ]
    (folder / "m.csv").write_text(table([header, *rows]))


def woocommerce(folder: Path) -> None:
    draw(folder, "uploads/a.jpg", "uploads/b.jpg", "uploads/c.jpg")
    rows = [["ID", "Type", "SKU", "Name", "Images"], ["12", "simple", "s1", "Lamp", "uploads/a.jpg, uploads/b.jpg"]]
    (folder / "m.csv").write_text("\ufeff" + table([*rows, ["13", "simple", "s2", "Sofa", "uploads/c.jpg"]]))


def magento(folder: Path) -> None:
    draw(folder, "media/a.jpg", "media/b.jpg")
    rows = [
        ["sku", "name", "base_image", "additional_images", "weight"],
        ["k1", "Cup", "media/a.jpg", "media/b.jpg", "1"],
    ]
    (folder / "m.csv").write_text(table(rows))


def merchant_feed(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    rows = [
        ["id", "title", "link", "image_link"],
        ["1", "Boat", "https://x", "a.jpg"],
        ["2", "Tree", "https://y", "b.jpg"],
    ]
    (folder / "m.txt.tsv").write_text(table(rows, "\t"))


def shop_api(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    rows = [{"id": 7, "title": "Chair", "images": [{"src": "a.jpg", "alt": None}, {"src": "b.jpg", "alt": "back"}]}]
    (folder / "m.json").write_text(json.dumps(rows))


def laion(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    columns = {"URL": ["a.jpg", "b.jpg"], "TEXT": ["a boat", "a tree"], "WIDTH": [1200, 640], "HEIGHT": [800, 480]}
    pq.write_table(pa.table(columns), folder / "m.parquet")


def img2dataset(folder: Path) -> None:
    for number, caption in enumerate(["a boat", "a tree"]):
        draw(folder, f"00000/{number:09d}.jpg")
        (folder / f"00000/{number:09d}.txt").write_text(caption)
        (folder / f"00000/{number:09d}.json").write_text(json.dumps({"caption": caption, "width": 64}))


def coco(folder: Path) -> None:
    draw(folder, "val/1.jpg", "val/2.jpg")
    rows = [
        {"file_name": f"val/{n}.jpg", "caption": f"scene {n}", "width": 640, "height": 480, "id": n} for n in (1, 2)
    ]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))


def hf_imagefolder(folder: Path) -> None:
    draw(folder, "train/a.png", "train/b.png")
    rows = [{"file_name": "a.png", "text": "a boat"}, {"file_name": "b.png", "text": "a tree"}]
    (folder / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _hf_table() -> pa.Table:
    images = [{"bytes": picture("png"), "path": "a.png"}, {"bytes": picture("jpg"), "path": None}]
    return pa.table({"image": images, "text": ["a boat", "a tree"]})


def hf_parquet(folder: Path) -> None:
    (folder / "data").mkdir()
    pq.write_table(_hf_table(), folder / "data/train-00000-of-00001.parquet")


def hf_save_to_disk(folder: Path) -> None:
    found = _hf_table()
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), found.schema) as writer:
        writer.write_table(found)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")


def spark(folder: Path) -> None:
    (folder / "_SUCCESS").write_bytes(b"")
    for day, prompt in (("2024-01-01", "a boat"), ("2024-01-02", "a tree")):
        (folder / f"day={day}").mkdir()
        columns = {"image": [picture()], "prompt": [prompt.encode().decode()], "status": ["ok"]}
        pq.write_table(pa.table(columns), folder / f"day={day}/part-00000-c000.snappy.parquet")


def pandas_feather(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    columns = {"image_path": ["a.jpg", "b.jpg"], "caption": ["a boat", ""], "score": [0.5, None]}
    pa.feather.write_feather(pa.table(columns), str(folder / "m.feather"), compression="lz4")


def german_excel_csv(folder: Path) -> None:
    draw(folder, "a.jpg")
    (folder / "m.csv").write_bytes(
        ("sep=;\r\n" + table([["Image", "Prompt"], ["a.jpg", "süßer Hund; läuft"], ["", ""]], ";")).encode("cp1252")
    )


def excel_unicode_text(folder: Path) -> None:
    draw(folder, "a.jpg")
    (folder / "m.tsv").write_bytes(table([["image", "prompt"], ["a.jpg", "süßer Hund"]], "\t").encode("utf-16"))


def workbook(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    book = openpyxl.Workbook()
    for row in (["ID", "Image", "Prompt", "Price"], [1, "a.jpg", "a boat", 9.5], [2, "b.jpg", "a tree", None]):
        book.active.append(row)
    book.save(folder / "m.xlsx")


def dam_export(folder: Path) -> None:
    draw(folder, "assets/2024/a.jpg", "assets/2024/b c.jpg")
    rows = [["Asset ID", "File Name", "Caption", "Rating"]]
    rows += [["A-1", "assets\\2024\\a.jpg", "a boat", "5"], ["A-2", "assets/2024/b%20c.jpg", "a tree", ""]]
    (folder / "m.csv").write_text(table(rows, "|"))


def phone(folder: Path) -> None:
    draw(folder, "DCIM/IMG_0001.JPG", "DCIM/IMG_0002.jpeg")
    for name in ("IMG_0001.MOV", "IMG_0001.AAE", ".DS_Store"):
        (folder / "DCIM" / name).write_bytes(b"x")


def url_list(folder: Path) -> None:
    draw(folder, "a.jpg", "b.png")
    (folder / "m.txt").write_text("a.jpg\n\nb.png\r\n")


def crawler(folder: Path) -> None:
    draw(folder, "a.jpg", "b.jpg")
    rows = [{"image_url": "a.jpg", "text": "a boat", "meta": {"depth": 1}}, {"image_url": "b.jpg", "text": "a tree"}]
    (folder / "m.ndjson.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def kohya(folder: Path) -> None:
    draw(folder, "10_cat/1.png", "10_cat/2.webp", "10_cat/3.jpg")
    (folder / "10_cat/1.txt").write_text("a cat,\nsitting")
    (folder / "10_cat/2.caption").write_text("a cat")


def weekly_files(folder: Path) -> None:
    for week, prompt in (("w1", "a boat"), ("w2", "a tree")):
        draw(folder, f"{week}/pics/a.jpg")
        (folder / week / "m.csv").write_text(table([["image", "prompt"], ["pics/a.jpg", prompt]]))


TWO: Final = ("a boat", "a tree")


def _template(text: str, **settings: Any) -> dict[str, Any]:
    return {"defaults": {"prompt": text}, **settings}


CATALOGUES: Final[Mapping[str, Catalogue]] = {
    "shopify": Catalogue(shopify, ["Red Shirt", "Red Shirt", "Mug"], settings=_template("{Title}")),
    "woocommerce": Catalogue(woocommerce, ["Lamp", "Lamp", "Sofa"], settings=_template("{Name}")),
    "magento": Catalogue(magento, ["Cup"], settings=_template("{name}", image_col="base_image", id_col="sku")),
    "merchant_feed": Catalogue(merchant_feed, ["Boat", "Tree"], ("m.txt.tsv",), _template("{title}")),
    "shop_api": Catalogue(shop_api, ["Chair", "Chair"], ("m.json",), _template("{title}")),
    "laion": Catalogue(laion, TWO, ("m.parquet",), {"not_knobs": "WIDTH,HEIGHT"}),
    "img2dataset": Catalogue(img2dataset, TWO, ("00000",)),
    "coco": Catalogue(coco, ["scene 1", "scene 2"], ("m.jsonl",), {"not_knobs": "width,height"}),
    "hf_imagefolder": Catalogue(hf_imagefolder, TWO, ("train",)),
    "hf_parquet": Catalogue(hf_parquet, TWO, ("data",)),
    "hf_save_to_disk": Catalogue(hf_save_to_disk, TWO, ("",)),
    "spark": Catalogue(spark, TWO, ("",)),
    "pandas_feather": Catalogue(pandas_feather, ["a boat", "run's"], ("m.feather",), _template("run's")),
    "german_excel_csv": Catalogue(german_excel_csv, ["süßer Hund; läuft"], settings={"encoding": "cp1252"}),
    "excel_unicode_text": Catalogue(excel_unicode_text, ["süßer Hund"], ("m.tsv",)),
    "workbook": Catalogue(workbook, TWO, ("m.xlsx",)),
    "dam_export": Catalogue(dam_export, TWO, settings={"id_col": "Asset ID"}),
    "phone": Catalogue(phone, ["run's", "run's"], ("DCIM",), _template("run's")),
    "url_list": Catalogue(url_list, ["run's", "run's"], ("m.txt",), _template("run's")),
    "crawler": Catalogue(crawler, TWO, ("m.ndjson.gz",)),
    "kohya": Catalogue(kohya, ["a cat, sitting", "a cat", "run's"], ("10_cat",), _template("run's")),
    "weekly_files": Catalogue(weekly_files, TWO, ("w1/m.csv", "w2/m.csv")),
}
