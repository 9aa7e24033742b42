"""The gallery in the browser after a run."""

from __future__ import annotations

import io
import webbrowser
from pathlib import Path

import pytest
from rich.console import Console

from pia_ray.cli.console import make_console, open_page


class Recorder(webbrowser.BaseBrowser):
    """A browser that keeps what it is asked to open."""

    def __init__(self, *, works: bool) -> None:
        super().__init__("recorder")
        self.works = works
        self.opened: list[str] = []

    def open(self, url: str, new: int = 0, autoraise: bool = True) -> bool:
        self.opened.append(url)
        return self.works


def test_what_is_written_with_colons_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("<lora:x:0.8>", markup=False)
    assert capsys.readouterr().out == "<lora:x:0.8>\n"


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(works=True)
    monkeypatch.setattr(webbrowser, "_tryorder", ["recorder"])
    monkeypatch.setattr(webbrowser, "_browsers", {"recorder": [None, recorder]})
    return recorder


def said(uri: str | None) -> str:
    stream = io.StringIO()
    open_page(Console(file=stream, width=500), uri)
    return stream.getvalue()


def test_the_gallery_of_a_run_is_opened(browser: Recorder, tmp_path: Path) -> None:
    assert said(str(tmp_path / "out dir" / "index.html")) == ""
    assert browser.opened == [f"{tmp_path.as_uri()}/out%20dir/index.html"]


def test_where_nothing_can_be_opened_a_line_says_why(browser: Recorder, tmp_path: Path) -> None:
    assert said("s3://bucket/out/index.html") == "--open opens pages of this machine only: s3://bucket/out/index.html\n"
    assert said(None) == "there is no gallery to open\n"
    assert browser.opened == []
    browser.works = False
    assert said(str(tmp_path / "i.html")) == f"there is no browser on this machine: open {tmp_path}/i.html on another\n"
