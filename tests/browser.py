"""The fixture `browser`. A test module uses it with `pytest_plugins = ["tests.browser"]`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium driven by playwright: the one of the system, or the one that `playwright install` installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        try:
            options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            opened = started.chromium.launch(executable_path=chromium, args=options)
        except playwright.Error as error:
            pytest.skip(f"no Chromium on this machine ({' or '.join(NAMES)}): {error}")
        yield opened
        opened.close()
