"""Opens pages in headless Chromium and checks them for errors and requests."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def browser_tab() -> Iterator[Any]:
    """Yield a tab of headless Chromium. A tab that has loaded Plotly once loads it in a third of the time."""
    from playwright.sync_api import sync_playwright

    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    executable = next(filter(None, found), None)
    if executable is None:
        (pytest.fail if os.environ.get("SCOP_BROWSER_REQUIRED") else pytest.skip)("Chromium is not installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser.new_page()
        browser.close()


@contextlib.contextmanager
def opened(tab: Any, path: Path, width: int, color_scheme: str = "light") -> Iterator[Any]:
    """Yield a rendered page; at the end, check for errors, requests and content wider than the window.

    Args:
        tab: result of `browser_tab`.
        path: HTML file.
        width: width of the window in pixels.
        color_scheme: light or dark.
    """
    problems: list[str] = []
    requests: list[str] = []
    listeners = {
        "console": lambda message: problems.append(message.text) if message.type == "error" else None,
        "pageerror": lambda error: problems.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(media="screen", color_scheme=color_scheme)
    tab.mouse.move(0, 0)
    for event, listener in listeners.items():
        tab.on(event, listener)
    try:
        tab.goto(path.as_uri())
        tab.wait_for_selector("#pareto .main-svg")
        yield tab
        assert problems == []
        assert requests == [path.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        for event, listener in listeners.items():
            tab.remove_listener(event, listener)
