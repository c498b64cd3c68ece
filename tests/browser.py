"""Headless Chromium, for the pages that people open; skips where it is not there."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def opened(path, **options):
    """A page of a file on disk, as playwright has it; fails on a script's error."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: not there")
    errors = []
    with playwright.sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = chromium.new_page(**options)
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(f"file://{path}")
        yield view
        chromium.close()
    assert errors == []
