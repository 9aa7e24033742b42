from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger
from pia_ray.catalog import gallery
from pia_ray.errors import OutputError
from pia_ray.result_row import ResultRow

HOSTILE = '</script><!--<script><img src=x onerror="window.hurt=1">&lt; @@SCRIPT@@ \\ \' \u2028 🐻'


def result(number: int = 0, *, output: str = "/elsewhere/out", **values) -> ResultRow:
    key = f"{number:04x}" * 16
    input_uri, thumbnail_uri = ledger.thumbnail_uris(output, f"row {number}", work_key=key)
    row = ResultRow(
        id=f"row {number}",
        video_index=0,
        status="succeeded",
        error_code=None,
        error_message=None,
        retryable=None,
        attempts=1,
        video_uri=ledger.video_uri(output, f"row {number}", work_key=key, ext="mp4"),
        thumbnail_uri=thumbnail_uri,
        input_thumbnail_uri=input_uri,
        image_uri=f"pictures/{number}.jpg",
        prompt="a red disc",
        seed=2**64 - 1,
        width=64,
        height=48,
        num_frames=16,
        fps=8,
        duration_s=2.0,
        size_bytes=1000,
        sha256="0" * 64,
        input_sha256=None,
        original_width=640,
        original_height=480,
        params=json.dumps({"prompt": "a red disc", "seed": str(2**64 - 1), "motion_scale": 5, "guidance_scale": 7.5}),
        work_key=key,
        model="demo@1",
        run_id="run",
        worker="host:1",
        fetch_s=0.5,
        animate_s=1.0,
        publish_s=0.5,
        gpu_s=0.75,
        motion=0.125,
        finished_at=datetime(2026, 5, 4, 12, tzinfo=UTC) + timedelta(seconds=2 * number),
    )
    return dataclasses.replace(row, **values)


def failure(number: int, code: str = "image_truncated", **values) -> ResultRow:
    none = dict.fromkeys(("video_uri", "thumbnail_uri", "input_thumbnail_uri", "duration_s", "gpu_s", "size_bytes"))
    message = "the file ends too early"
    failed = {"status": "failed", "error_code": code, "error_message": message, "retryable": False}
    return result(number, **{**none, **failed, **values})


def page_of(*rows: ResultRow, title: str = "Discs", **extra) -> str:
    return gallery.gallery_html([{**dataclasses.asdict(row), **extra} for row in rows], title=title)


class Page(HTMLParser):
    """What a browser makes of the page: its elements, its text outside of scripts, and the content of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def rows_of(page: str) -> dict:
    return json.loads(Page(page).scripts[0])


def column(page: str, name: str, kind: str = "columns") -> list:
    packed = rows_of(page)[kind][name]
    return packed["v"] if "v" in packed else [packed["d"][i] for i in packed["i"]]


def test_links_are_relative_whatever_the_output_was_called_when_it_was_written():
    for output in ("/tmp/out", "s3://bucket/a b/out", "out", "file:///tmp/a%20b/out"):
        page = page_of(result(7, output=output))
        stem = f"00/row-7-{'0007' * 4}"
        assert column(page, "video") == [f"videos/{stem}.mp4"]
        assert column(page, "poster") == [f"thumbnails/{stem}-input.webp"]
        assert column(page, "thumbnail") == [f"thumbnails/{stem}-video.webp"]


def test_links_are_percent_encoded_and_lead_nowhere_else():
    page = page_of(result(video_uri="/out/videos/00/a b#c?d%é.mp4"))
    assert column(page, "video") == ["videos/00/a%20b%23c%3Fd%25%C3%A9.mp4"]
    assert column(page_of(result(video_uri="javascript:alert(1)")), "video") == [None]
    assert column(page_of(result(video_uri="https://evil.example/x.mp4")), "video") == [None]


def test_text_of_any_kind_stays_text():
    page = page_of(
        result(id=HOSTILE, prompt=HOSTILE, model=HOSTILE),
        failure(1, HOSTILE, error_message=HOSTILE),
        title=HOSTILE,
        column=HOSTILE,
    )
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert len(parsed.scripts) == 2
    assert column(page, "id")[0] == column(page, "prompt")[0] == column(page, "error_message")[1] == HOSTILE
    assert column(page, "column", "extra") == [HOSTILE, HOSTILE]
    assert parsed.text.count("onerror=") == 5  # title twice, model, error code twice


def test_a_lone_surrogate_does_not_spoil_the_page():
    page = page_of(result(prompt="a\ud800b"))
    assert column(page, "prompt") == ["a\ud800b"]
    page.encode()


def test_the_page_asks_for_nothing_from_elsewhere():
    parsed = Page(page_of(result(), failure(1)))
    for _, attributes in parsed.elements:
        for name in ("src", "href"):
            assert not re.match(r"(?i)(https?:)?//", attributes.get(name) or "")
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "@@" not in parsed.scripts[1]


def test_seeds_and_large_integers_keep_their_values():
    page = page_of(result(), stock=2**63 + 1)
    assert column(page, "seed") == ["18446744073709551615"]
    assert column(page, "stock", "extra") == [str(2**63 + 1)]


def test_cells_that_json_cannot_hold_are_shown_as_text():
    page = page_of(
        result(motion=float("nan"), gpu_s=float("inf")), picture=b"12345", price=float("inf"), tags=["a", "b"]
    )
    assert column(page, "motion") == [None]
    assert [column(page, name, "extra")[0] for name in ("picture", "price", "tags")] == ["5 bytes", "inf", '["a", "b"]']


def test_repeated_values_are_written_once():
    page = page_of(*(result(i, prompt="many words " * 20) for i in range(200)))
    assert page.count("many words many") == 20 / 2
    assert column(page, "prompt") == ["many words " * 20] * 200


def test_secrets_in_image_urls_stay_out():
    page = page_of(
        result(0, image_uri="https://user:password@shop.example/a.jpg?X-Amz-Signature=secret#f"),
        result(1, image_uri="data:image/png;base64," + "A" * 5000),
    )
    assert column(page, "image") == ["https://shop.example/a.jpg", "data:image/png;base64, 5,022 characters"]
    assert "secret" not in page
    assert "password" not in page


def test_motion_has_its_name_and_settings_are_listed():
    page = page_of(result())
    assert column(page, "motion_scale") == [5]
    assert column(page, "motion_name") == ["loop-large"]
    assert column(page, "guidance_scale", "knobs") == [7.5]
    assert "seed" not in rows_of(page)["knobs"]


def test_the_header_says_what_came_of_the_run():
    text = Page(page_of(*(result(i) for i in range(30)), failure(30), failure(31), failure(32, "timeout"))).text
    assert "Succeeded 30 of 33" in text
    assert "Failed 3" in text
    assert "Video 60.0 s" in text
    assert "Engine time 22.5 s" in text
    assert "Videos/min 27.3" in text  # 30 videos in 2 s to the first end and 64 s to the last
    assert "Made with demo@1, 4 May 2026" in text


def test_a_pause_between_two_runs_does_not_slow_the_throughput():
    later = datetime(2026, 5, 9, tzinfo=UTC)
    text = Page(page_of(result(0), result(1, run_id="second", finished_at=later))).text
    assert "Videos/min 30.0" in text


def test_failures_are_listed_by_code_with_what_to_do():
    text = Page(page_of(failure(0), failure(1), failure(2, "out_of_memory", retryable=True))).text
    assert "3 rows failed" in text
    assert "image_truncated 2 The file is cut off or damaged. Mend the input, then: --retry image_truncated" in text
    assert "out_of_memory 1 The row does not fit on this device even alone. May pass when tried again:" in text


def test_an_output_without_rows_has_a_page():
    page = page_of()
    assert rows_of(page)["count"] == 0
    assert "Nothing here yet" in Page(page).text


def test_without_javascript_the_page_says_where_things_are():
    start = page_of(result()).split("<noscript>")[1].split("</noscript>")[0]
    assert "JavaScript is off" in start
    assert 'href="videos/"' in start
    assert "results.parquet" in start


def write_results(output, rows, **extra) -> None:
    table = ledger.to_table(rows)
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, output / "results.parquet")


def test_the_gallery_of_an_output_is_written_beside_its_results(tmp_path):
    write_results(tmp_path, [result(0), failure(1)], sku=["A-1", None])
    uri = gallery.write_gallery(str(tmp_path), title="Summer")
    assert uri == str(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<title>Summer</title>" in page
    assert column(page, "status") == ["succeeded", "failed"]
    assert column(page, "sku", "extra") == ["A-1", None]


def test_the_folder_names_a_gallery_without_a_title(tmp_path):
    write_results(tmp_path, [result()])
    gallery.write_gallery(str(tmp_path))
    assert f"<title>{tmp_path.name}</title>" in (tmp_path / "index.html").read_text("utf-8")


def test_an_output_without_results_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no results"):
        gallery.write_gallery(str(tmp_path))
