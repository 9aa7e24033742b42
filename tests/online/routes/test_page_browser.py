"""The playground in a real browser: headless Chromium against the endpoint on a free port, with a fake animator."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import urllib.request
from pathlib import Path

import pytest

from pia_ray.config.knob_types import MOTION_NAMES
from pia_ray.config.model import ModelConfig
from tests.online.video_server import hash_of, png, serve_videos
from tests.videos import decode_frames

pytestmark = pytest.mark.heavy

SMALL = {"num_frames": "8", "num_inference_steps": "4", "width": "64", "height": "64"}
HOSTILE = '<img src=x onerror="window.hurt=1">'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        reason = "chromium or chromedriver is not installed (Debian: chromium chromium-driver)"
        if os.environ.get("PIA_RAY_REQUIRE_BROWSER") == "1":
            pytest.fail(f"PIA_RAY_REQUIRE_BROWSER is 1, but {reason}")
        pytest.skip(reason)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1300,950",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(chromedriver))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    loras = {"pixar": {"path": "pixar.safetensors", "weight": 0.8}, "detail": {"path": "detail.safetensors"}}
    demo = {**ModelConfig.named("demo").model_dump(), "loras": loras}
    with serve_videos(str(tmp_path_factory.mktemp("jobs")), step_s=0.05, models={"demo": demo}) as up:
        yield up


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "gradient.png"
    file.write_bytes(png(96, 64))
    return file


def until(browser, script: str, *arguments):
    """Waits for the script to give something true; what it gives is returned."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, poll_frequency=0.1).until(
        lambda driver: driver.execute_script(script, *arguments), message=script
    )


def visit(browser, url: str) -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url + "/")
    until(browser, "return document.getElementById('version').textContent")


def fill(browser, picture: Path, prompt: str = "a field of grass in the wind", **knobs: str) -> None:
    browser.find_element("id", "picture").send_keys(str(picture))
    browser.find_element("id", "prompt").send_keys(prompt)
    browser.execute_script("document.getElementById('more').open = true")
    for name, value in {**SMALL, **knobs}.items():
        field = browser.find_element("id", name)
        if field.tag_name == "select":
            field.send_keys(value)
        else:
            field.clear()
            field.send_keys(value)


def finished(browser) -> dict[str, str]:
    """What the page says of the video, once it is there."""
    until(browser, "return !document.getElementById('shown').hidden && document.getElementById('work').hidden")
    lines = browser.execute_script(
        "const text = (node) => node.textContent;"
        "return [...document.querySelectorAll('#facts div')].map((line) => [...line.children].map(text))"
    )
    return dict(lines)


def complaints_of(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def requests_of(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def focused(browser) -> str:
    """Id of the element that has the focus; its name and value for radio buttons."""
    return browser.execute_script(
        "const at = document.activeElement; return at.type === 'radio' ? `${at.name}=${at.value}` : at.id"
    )


def test_an_uploaded_picture_becomes_a_video_that_plays_and_is_downloaded(browser, server, picture, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    visit(browser, server.url)
    fill(browser, picture, HOSTILE, seed=str(2**64 - 1))
    browser.find_element("css selector", "input[value='loop-'] + span").click()
    browser.find_element("id", "go").click()
    until(browser, "return document.getElementById('bar').value > 0")
    facts = finished(browser)
    assert facts["Seed"] == str(2**64 - 1)
    assert facts["Motion"] == "loop-small"
    assert facts["Length"].startswith("8 frames")
    until(browser, "return document.querySelector('#video video').currentTime > 0.2")
    sizes = "const v = document.querySelector('#video video'); return [v.videoWidth, v.videoHeight]"
    assert browser.execute_script(sizes) == [64, 64]
    assert browser.execute_script("return document.getElementById('original').naturalWidth") == 96
    assert browser.execute_script("return window.hurt === undefined")
    browser.find_element("id", "download").click()
    file = tmp_path / browser.execute_script("return document.getElementById('download').download")
    WebDriverWait(browser, 20).until(lambda _: file.exists() and file.stat().st_size, message=file.name)
    assert decode_frames(file).shape == (8, 64, 64, 3)
    # What was made is there after a reload, and gives its settings back.
    browser.refresh()
    until(browser, "return document.querySelector('#history .open')").click()
    assert finished(browser)["Seed"] == str(2**64 - 1)
    browser.find_element("id", "reuse").click()
    assert browser.find_element("id", "prompt").get_property("value") == HOSTILE
    assert browser.execute_script("return document.querySelector('input[name=kind]:checked').value") == "loop-"
    browser.find_element("id", "forget").click()
    assert not browser.find_elements("css selector", "#history li")
    assert complaints_of(browser) == []
    away = [url for url in requests_of(browser) if not url.startswith((server.url, "blob:", "data:", "about:"))]
    assert away == []


def test_jobs_with_all_inputs_of_the_model_go_on_while_the_page_is_closed(browser, server, picture):
    visit(browser, server.url)
    assert not browser.find_element("id", "ip_adapter_image-row").is_displayed()  # the model has no IP-Adapter
    fill(browser, picture, "the first", num_inference_steps="30", preset="fast")
    for name in ("end_image", "mask_image"):
        browser.find_element("id", name).send_keys(str(picture))
    browser.find_element("css selector", "[data-lora=pixar]").send_keys("0.5")
    browser.find_element("id", "go").click()
    until(browser, "return document.querySelector('#history .open') && !document.getElementById('go').disabled")
    browser.execute_script("document.getElementById('prompt').value = 'the second'")
    browser.find_element("id", "go").click()
    until(browser, "return document.querySelectorAll('#history .open').length === 2")
    assert not browser.find_elements("css selector", "#history .open[data-id='undefined']")
    browser.get("about:blank")
    browser.get(server.url + "/")
    until(browser, "return [...document.querySelectorAll('#history img')].filter((n) => n.naturalWidth).length === 2")
    done = "return [...document.querySelectorAll('#history .state')].every((n) => !n.textContent)"
    until(browser, f"{done} && localStorage.length === 0")
    assert finished(browser)["Length"].startswith("8 frames")
    browser.find_elements("css selector", "#history .open")[1].click()
    assert browser.find_element("id", "shown-prompt").text == "the first"
    with urllib.request.urlopen(f"{server.url}/v1/videos") as answer:
        made = json.load(answer)["data"][1]["params"]
    assert made["end_image"].startswith("sha256:") and made["mask_image"] == made["end_image"]
    assert (made["lora"], made["preset"]) == ("detail:1+pixar:0.5", "fast")
    browser.find_element("id", "reuse").click()
    assert browser.find_element("id", "end_image-remove").is_displayed()
    assert browser.find_element("css selector", "[data-lora=pixar]").get_property("value") == "0.5"
    browser.find_element("id", "forget").click()
    assert complaints_of(browser) == []


def test_an_error_is_shown_as_the_server_says_it_at_its_field(browser, server, picture):
    visit(browser, server.url)
    fill(browser, picture, num_frames="9000")
    browser.execute_script("document.getElementById('more').open = false")
    browser.find_element("id", "go").click()
    said = until(browser, "const box = document.getElementById('fault'); return !box.hidden && box.innerText")
    assert "num_frames" in said
    assert "bad_parameter" in said
    assert focused(browser) == "num_frames"
    assert browser.find_element("id", "num_frames").get_attribute("aria-invalid") == "true"
    field = browser.find_element("id", "num_frames")
    field.clear()
    field.send_keys("8")
    browser.execute_script("document.getElementById('prompt').value = 'oom'")
    browser.find_element("id", "go").click()
    said = until(
        browser, "const b = document.getElementById('fault'); return !b.hidden && b.innerText.match(/Code (\\w+)/)?.[1]"
    )
    assert said == "out_of_memory"  # in the stream, after the answer had begun
    assert browser.find_element("id", "go").is_enabled()


def test_the_keyboard_alone_sends_and_stops(browser, server, picture):
    from selenium.webdriver.common.keys import Keys

    visit(browser, server.url)
    browser.find_element("id", "picture").send_keys(str(picture))
    browser.execute_script("document.getElementById('picture').focus()")
    press(browser, Keys.TAB)
    assert focused(browser) == "example"
    press(browser, Keys.TAB, "hang")
    assert focused(browser) == "prompt"
    press(browser, Keys.TAB, Keys.ARROW_RIGHT)
    assert focused(browser) == "kind=loop-"
    press(browser, Keys.TAB, Keys.ARROW_RIGHT)
    assert focused(browser) == "strength=moderate"
    assert "the last frame is the picture again" in browser.find_element("id", "motion-text").text
    press(browser, Keys.TAB)
    assert browser.execute_script("return document.activeElement.tagName") == "SUMMARY"
    press(browser, Keys.TAB)
    assert focused(browser) == "go"
    # The job goes on from the server's answer, also where the browser is slow to keep it.
    browser.execute_script("IDBFactory.prototype.open = () => ({})")
    press(browser, Keys.ENTER)
    until(browser, "return document.querySelector('#history .open') && document.activeElement.id === 'stop'")
    press(browser, Keys.ENTER)
    until(browser, "return document.getElementById('said').textContent === 'Stopped.'")
    assert focused(browser) == "go"
    values = "return [...document.querySelectorAll(`input[name=${arguments[0]}]`)].map((n) => n.value)"
    kinds, strengths = (browser.execute_script(values, name) for name in ("kind", "strength"))
    assert {kind + strength for kind in kinds for strength in strengths} == set(MOTION_NAMES)
    # Every field has a name for those who do not see it.
    unnamed = "return [...document.querySelectorAll('input, select, textarea')].filter((n) => !n.labels.length).length"
    assert browser.execute_script(unnamed) == 0


def test_the_example_picture_fills_the_form_whose_call_is_copied_as_a_curl_command(browser, server):
    visit(browser, server.url)
    browser.find_element("id", "example").click()
    until(browser, "return document.getElementById('preview').naturalWidth > 0")
    browser.find_element("id", "curl").click()
    command = until(browser, "return document.getElementById('curl-text').textContent")
    assert shlex.split(command.replace("\\\n", "")) == [
        "curl",
        "--fail-with-body",
        f"{server.url}/v1/animations",
        "-F",
        'image=@"example.jpg"',
        *["--form-string", "prompt=pan right, mountains at sunset"],
        *["--form-string", "motion_scale=small"],
        *["--form-string", "format=mp4"],
        *["-o", "animation.mp4"],
    ]
    browser.get(f"{server.url}/page/reference.html")
    assert browser.find_element("id", "create_animation").is_displayed()
    assert complaints_of(browser) == []


def test_a_phone_shows_the_whole_page_in_one_column(browser, server):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        visit(browser, server.url)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        low, top = browser.execute_script(
            "return [document.getElementById('form').getBoundingClientRect().bottom,"
            " document.getElementById('result').getBoundingClientRect().top]"
        )
        assert top >= low
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_with_keys_asks_for_one_and_the_tab_remembers_it(browser, picture, tmp_path):
    operator = "an-operator-s-key"
    with serve_videos(str(tmp_path / "jobs"), api_keys=[hash_of("sk-mine")], operator_key=operator) as locked:
        with urllib.request.urlopen(f"{locked.url}/") as answer:
            policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        visit(browser, locked.url)
        fill(browser, picture)
        browser.find_element("id", "go").click()
        said = until(browser, "const box = document.getElementById('fault'); return !box.hidden && box.innerText")
        assert "API key" in said
        assert focused(browser) == "key"
        browser.find_element("id", "key").send_keys("sk-mine")
        browser.find_element("id", "format").send_keys("gif")
        browser.find_element("id", "go").click()
        assert finished(browser)["File"].startswith("gif")
        assert until(browser, "return document.querySelector('#video img').naturalWidth") == 64
        browser.refresh()
        until(browser, "return document.getElementById('version').textContent")
        assert browser.find_element("id", "key").get_property("value") == "sk-mine"
        assert browser.execute_script("return localStorage.length") == 0
        # A job that fails is on the operator's page with its reason, and is tried again from there.
        fill(browser, picture, f"nan {HOSTILE}")
        browser.find_element("id", "go").click()
        until(browser, "const box = document.getElementById('fault'); return !box.hidden && box.innerText")
        browser.get(f"{locked.url}/operator")
        browser.find_element("id", "key").send_keys("sk-mine-is-none\t")
        assert "operator's key" in until(browser, "return document.getElementById('fault').innerText")
        browser.find_element("id", "key").clear()
        browser.find_element("id", "key").send_keys(f"{operator}\t")
        reason = until(browser, "return document.querySelector('#failed td:nth-child(2)')?.textContent")
        assert reason.startswith("nan_frames: ")
        browser.find_element("css selector", "#failed button").click()
        until(browser, "return /retries 1/.test(document.body.textContent)")
        assert browser.execute_script("return window.hurt === undefined")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_a_dropped_picture_is_taken_and_a_broken_one_is_refused_by_the_server(browser, server):
    visit(browser, server.url)
    browser.execute_script(
        """
        const dragged = new DataTransfer();
        dragged.items.add(new File(['no picture'], 'dropped.png', {type: 'image/png'}));
        const event = new DragEvent('drop', {dataTransfer: dragged, bubbles: true, cancelable: true});
        document.getElementById('drop').dispatchEvent(event);
        """
    )
    assert "dropped.png" in browser.find_element("id", "drop-text").text
    browser.find_element("id", "prompt").send_keys("anything")
    browser.find_element("id", "go").click()
    said = until(browser, "const box = document.getElementById('fault'); return !box.hidden && box.innerText")
    assert "unsupported_image" in said or "bad_image" in said
    assert focused(browser) == "picture"
