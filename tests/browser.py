"""A real browser for tests of pages: Chromium without a window, and what it complains of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WIDTHS_PX, SCHEMES = (400, 1400), ("light", "dark")
_EXCESS_PX = "return document.documentElement.scrollWidth - innerWidth"
_BROKEN = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
_PAPER = "return getComputedStyle(document.body).backgroundColor"


@contextmanager
def open_browser() -> Iterator[Any]:
    """Chromium, driven by selenium; skips the test where either is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def complaints(browser: Any, address: str) -> list[str]:
    """What is wrong with a page at each width and in each colour scheme.

    Messages of its console, images that are missing, content that is wider than the window, one background in both.
    """
    found, papers = list[str](), set[str]()
    for scheme in SCHEMES:
        for width in WIDTHS_PX:
            _open(browser, address, width, scheme)
            where = f"{address} at {width} px, {scheme}: "
            found += [where + entry["message"] for entry in browser.get_log("browser")]
            found += [f"{where}{image} is missing" for image in browser.execute_script(_BROKEN)]
            if (num_px := browser.execute_script(_EXCESS_PX)) > 0:
                found.append(f"{where}{num_px} px too wide")
            papers.add(browser.execute_script(_PAPER))
    return found if len(papers) == len(SCHEMES) else [*found, f"{address}: one background in light and dark"]


def _open(browser: Any, address: str, width_px: int, scheme: str) -> None:
    size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
    browser.get(address)
    browser.execute_script("localStorage.clear()")  # where the scheme of an earlier visit may be kept
    browser.refresh()
