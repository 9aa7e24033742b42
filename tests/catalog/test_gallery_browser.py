"""The gallery in a real browser: headless Chromium, driven by selenium over Debian's chromedriver."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger
from pia_ray.catalog import gallery
from pia_ray.catalog.local import run_local
from pia_ray.media import image, video
from pia_ray.result_row import ResultRow
from tests.catalog.test_local import CountingAnimator, by_id
from tests.catalog.test_review import catalog

pytestmark = pytest.mark.heavy

HOSTILE = '</script><img src=x onerror="window.hurt=1"> 🐻'
FORMATS = ("mp4", "webm", "gif", "webp")


def browser_or_reason():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        return None, "chromium or chromedriver is not installed (Debian: chromium chromium-driver)"
    try:
        import selenium  # noqa: F401 - only whether it is there
    except ImportError:
        return None, "selenium is not installed"
    return (chromium, chromedriver), ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found, reason = browser_or_reason()
    if found is None:
        if os.environ.get("PIA_RAY_REQUIRE_BROWSER") == "1":
            pytest.fail(f"PIA_RAY_REQUIRE_BROWSER is 1, but {reason}")
        pytest.skip(reason)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = found[0]
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(found[1]))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def moving_disc(number: int) -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    frames = np.full((16, 64, 96, 3), (40 + 5 * (number % 30), 90, 120), np.uint8)
    for i, frame in enumerate(frames):
        frame[(x - 6 * i) ** 2 + (y - 32) ** 2 < 150] = 240, 200, 60
    return frames


def write_output(output: Path, count: int) -> Path:
    """An output of `count` rows over the four formats, every tenth failed, with a hostile prompt in the sixth."""
    files = {}
    for i, video_format in enumerate(FORMATS):
        frames = moving_disc(9 * i)
        encoded = video.encode(frames, fps=8, format=video_format, provenance={"id": str(i)})
        files[video_format] = (
            encoded.content,
            image.thumbnail(image.as_rgb(frames[0])),
            video.thumbnail(frames, fps=8),
        )
    rows = []
    for i in range(count):
        key, video_format, failed = f"{i:08x}" * 8, FORMATS[i % 4], i % 10 == 9
        uri = ledger.video_uri(str(output), f"disc-{i}", work_key=key, ext=video_format)
        uris = (uri, *ledger.thumbnail_uris(str(output), f"disc-{i}", work_key=key))
        if not failed:
            for place, content in zip(uris, files[video_format], strict=True):
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                Path(place).write_bytes(content)
        rows.append(
            ResultRow(
                id=f"disc-{i}",
                video_index=0,
                status="failed" if failed else "succeeded",
                error_code="image_truncated" if failed else None,
                error_message=f"the file of disc {i} ends too early" if failed else None,
                retryable=False if failed else None,
                attempts=1,
                video_uri=None if failed else uris[0],
                input_thumbnail_uri=None if failed else uris[1],
                thumbnail_uri=None if failed else uris[2],
                image_uri=f"pictures/{i}.jpg",
                prompt=HOSTILE if i == 5 else f"a disc that crosses field {i}",
                seed=2**64 - 1 - i,
                width=96,
                height=64,
                num_frames=16,
                fps=8,
                duration_s=None if failed else 2.0,
                size_bytes=None if failed else len(files[video_format][0]),
                sha256=None,
                input_sha256=None,
                original_width=96,
                original_height=64,
                params=json.dumps({"motion_scale": i % 9, "guidance_scale": 7.5}),
                work_key=key,
                model="demo@1",
                run_id="run",
                worker="host:1",
                fetch_s=0.1,
                animate_s=1.0 + i / count,
                publish_s=0.1,
                gpu_s=0.9,
                motion=None if failed else (i % 7) / 10,
                finished_at=datetime(2026, 5, 4, 12, tzinfo=UTC) + timedelta(seconds=i),
            )
        )
    output.mkdir(exist_ok=True)
    pq.write_table(ledger.to_table(rows), output / "results.parquet")
    return Path(gallery.write_gallery(str(output), title="Discs"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    # Written in one place and looked at in another: links must not depend on it.
    first = write_output(tmp_path_factory.mktemp("gallery") / "out", 20).parent
    moved = first.with_name("a moved folder, 100% #1")
    first.rename(moved)
    return moved / "index.html"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_output(tmp_path_factory.mktemp("gallery") / "out", 2000)


def visit(browser, url: str) -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url)
    until(browser, "return document.querySelectorAll('.card').length > 0")


def until(browser, script: str, *arguments):
    """Waits for the script to give something true; what it gives is returned."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, poll_frequency=0.1).until(
        lambda driver: driver.execute_script(script, *arguments), message=script
    )


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def type_filter(browser, text: str) -> None:
    field = browser.find_element("id", "filter")
    field.clear()
    field.send_keys(text)


def requests_of(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def complaints_of(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def test_every_row_has_a_card_and_hostile_text_does_nothing(browser, small):
    visit(browser, small.as_uri())
    assert len(texts(browser, ".card")) == 20
    assert texts(browser, ".card.failed .code") == ["image_truncated"] * 2
    assert HOSTILE in texts(browser, ".card .prompt")
    assert browser.execute_script("return window.hurt === undefined")
    assert f"seed {2**64 - 1}" in texts(browser, ".facts")[0]


def test_videos_of_every_format_really_play(browser, small):
    visit(browser, small.as_uri())
    for kind in ("mp4", "webm"):
        script = """
            const card = document.querySelectorAll('.card')[arguments[0]];
            card.scrollIntoView({block: 'center'});
            const video = card.querySelector('video');
            return video.readyState >= 2 && video.currentTime > 0.2 && video.videoWidth === 96
                && !video.paused && video.currentSrc.endsWith(arguments[1]);"""
        until(browser, script, FORMATS.index(kind), kind)
    for kind in ("gif", "webp"):
        script = """
            const card = document.querySelectorAll('.card')[arguments[0]];
            card.scrollIntoView({block: 'center'});
            const image = card.querySelector('.pane.video img');
            return image.src.endsWith(arguments[1]) && image.complete && image.naturalWidth === 96;"""
        until(browser, script, FORMATS.index(kind), kind)
    assert not texts(browser, "[data-state=fallback]")


def test_the_page_is_quiet_and_asks_nobody_else(browser, small):
    visit(browser, small.as_uri())
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    until(browser, "return [...document.querySelectorAll('.pane img')].some((image) => image.complete)")
    browser.execute_script("document.querySelector('.card .open').click()")
    until(browser, "return document.querySelector('dialog video').currentTime > 0")
    asked = requests_of(browser)
    folder = small.parent.as_uri()
    assert any(url.endswith(".mp4") for url in asked)
    assert [url for url in asked if not url.startswith((folder, "data:", "about:"))] == []
    assert complaints_of(browser) == []


def test_it_works_from_a_web_server_too(browser, small):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=small.parent)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            visit(browser, f"http://127.0.0.1:{server.server_port}/index.html")
            until(browser, "return document.querySelector('video').currentTime > 0.2")
            assert complaints_of(browser) == []
        finally:
            browser.get("about:blank")
            server.shutdown()


def test_the_filter_and_the_chips_narrow_what_is_shown(browser, small):
    visit(browser, small.as_uri())
    type_filter(browser, "field 13")
    until(browser, "return document.querySelectorAll('.card').length === 1")
    assert texts(browser, ".card .id") == ["disc-13"]
    assert texts(browser, "#shown") == ["1 of 20"]
    type_filter(browser, str(2**64 - 1 - 7))
    until(browser, "return document.querySelector('.card .id').textContent === 'disc-7'")
    type_filter(browser, "no such thing")
    until(browser, "return !document.getElementById('nothing').hidden")
    browser.find_element("id", "reset").click()
    until(browser, "return document.querySelectorAll('.card').length === 20")
    browser.find_element("css selector", ".chip[data-status=failed]").click()
    until(browser, "return document.querySelectorAll('.card').length === 2")
    assert texts(browser, ".card .id") == ["disc-9", "disc-19"]
    type_filter(browser, "disc 19 early")
    until(browser, "return document.querySelectorAll('.card').length === 1")


def test_sorting_orders_the_cards(browser, small):
    visit(browser, small.as_uri())
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "sort")).select_by_visible_text("Slowest first")
    assert texts(browser, ".card .id")[:2] == ["disc-19", "disc-18"]
    Select(browser.find_element("id", "sort")).select_by_visible_text("Most motion")
    assert texts(browser, ".card .id")[:2] == ["disc-6", "disc-13"]


def test_a_failed_row_shows_its_reason_and_what_to_do(browser, small):
    visit(browser, small.as_uri())
    card = browser.find_element("css selector", ".card.failed")
    assert "the file of disc 9 ends too early" in card.text
    assert "The file is cut off or damaged." in card.text
    assert "--retry image_truncated" in card.text
    browser.execute_script("arguments[0].querySelector('.open').click()", card)
    until(browser, "return document.getElementById('sheet').open")
    assert "the file of disc 9 ends too early" in browser.find_element("id", "sheet").text


def test_it_can_be_used_by_keyboard_alone(browser, small):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    visit(browser, small.as_uri())
    press("/", "field 1")
    until(browser, "return document.activeElement.id === 'filter' && document.querySelectorAll('.card').length === 11")
    press(Keys.ESCAPE)
    until(browser, "return document.querySelectorAll('.card').length === 20")
    browser.execute_script("document.querySelector('.card .open').focus()")
    press(Keys.ENTER)
    until(browser, "return document.getElementById('sheet').open")
    assert texts(browser, "#sheet-id") == ["disc-0"]
    press(Keys.ARROW_RIGHT)
    assert texts(browser, "#sheet-id") == ["disc-1"]
    press(Keys.ESCAPE)
    until(browser, "return !document.getElementById('sheet').open")
    assert browser.execute_script("return document.activeElement.getAttribute('aria-label')").startswith("disc-0")


def test_two_thousand_rows_are_drawn_as_they_are_reached(browser, large):
    visit(browser, large.as_uri())
    assert texts(browser, "#shown") == ["2,000 animations"]
    assert len(texts(browser, ".card")) < 200
    script = "scrollTo(0, document.body.scrollHeight); return document.querySelectorAll('.card').length >= 400"
    until(browser, script)
    assert browser.execute_script("return document.querySelectorAll('video[src]').length") < 60
    type_filter(browser, "disc-1999")
    until(browser, "return document.querySelectorAll('.card').length === 1")
    assert complaints_of(browser) == []


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_small_screen(browser, small, width):
    metrics = {"width": width, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        visit(browser, small.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.execute_script("document.querySelector('.card .open').click()")
        until(browser, "return document.getElementById('sheet').open")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_review_by_keys_goes_out_as_a_file_whose_rejected_rows_come_back_first(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    def progress():
        return texts(browser, "#review-progress")

    note = 'melts, "badly" </script>'
    config = catalog(tmp_path, num_rows=5)
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
        page = Path(config.output, "index.html").as_uri()
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        visit(browser, page)
        browser.find_element("id", "start-review").click()
        press("a")
        assert progress() == ["1 of 5; 1 approved, 0 rejected"]
        press("r", "u")
        assert progress() == ["1 of 5; 1 approved, 0 rejected"]
        press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "n", note, Keys.ENTER, "r")
        assert progress() == ["2 of 5; 1 approved, 1 rejected"]
        visit(browser, page)  # what was judged is there when the page comes back
        assert texts(browser, ".card .reviewed:not([hidden])") == ["✓ approved", f"✕ rejected {note}"]
        browser.find_element("css selector", "#bar .save-review").click()
        file = tmp_path / "review.csv"
        for _ in range(100):
            if file.exists() and file.stat().st_size:
                break
            time.sleep(0.05)
        animator.asked.clear()
        run_local(config.model_copy(update={"review": str(file)}), animator=animator)
    assert dict(animator.asked) == {"r3": 1}
    rows = by_id(config)
    assert (rows["r0"]["review"], rows["r3"]["review_note"], rows["r3"]["take"]) == ("approved", note, 1)
    visit(browser, page)
    assert texts(browser, ".card .id")[0] == "r3", "the row that was taken again comes first"
    assert texts(browser, ".card .reviewed:not([hidden])") == [f"↻ taken again {note}", "✓ approved"]
    browser.find_element("id", "start-review").click()
    assert texts(browser, "#review-sheet .earlier") == [f"↻ Taken again. Rejected before: {note}"]
    assert progress() == ["1 of 5; 1 approved, 0 rejected"]
    assert complaints_of(browser) == []
