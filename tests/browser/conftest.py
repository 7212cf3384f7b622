"""A headless browser, and a server to open in it.

FASTAV_PAGE_URL: a server that runs already. FASTAV_CHROMIUM: the browser's program; else Chromium from the PATH, else
the one that `playwright install chromium` installed.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

SERVE = ("from fastav.cli import main; main()", "serve", "tiny-long", "--port", "0")
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
# a camera and a microphone that the browser makes up; a test that wants none denies them
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream"]
PATIENCE = 30_000  # milliseconds for an answer of the embedded model on a busy machine


@contextmanager
def _server() -> Iterator[str]:
    """A server of the embedded model in a process of its own; gives its address."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", *SERVE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := ADDRESS.search(line):
                yield found[0]
                return
        pytest.fail("the server did not start:\n" + "".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=30)  # reads on, so that a full pipe does not keep the server from ending


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    if url := os.environ.get("FASTAV_PAGE_URL"):
        yield url.rstrip("/")
        return
    with _server() as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    program = os.environ.get("FASTAV_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser):
    """A function that opens a tab with the given options; what goes wrong in its scripts fails the test."""
    contexts, problems = [], []

    def opened(**options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        # the browser also logs every answer of the server that is no success, which tests bring about
        tab.on(
            "console", lambda m: problems.append(m.text) if m.type == "error" and "status of" not in m.text else None
        )
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_tab, address):
    tab = open_tab()
    tab.goto(address)
    tab.wait_for_selector("#examples button")
    return tab
