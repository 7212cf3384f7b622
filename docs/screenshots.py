"""Make the pictures of docs/serve.md: `python docs/screenshots.py URL`, with `fastav serve tiny-long` at the URL.

Needs playwright and Chromium, which FASTAV_CHROMIUM names if it is not in the PATH.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
QUESTION = "which shape fits the sound?"


def main(url: str) -> None:
    """Ask about the clip of half a minute, and picture the answers and what was kept."""
    program = os.environ.get("FASTAV_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 860}, reduced_motion="reduce")
        page.goto(url)
        page.get_by_text("half-minute.mp4").first.click()
        page.locator("#question").fill(QUESTION)
        page.locator("#question").press("Enter")
        page.get_by_text("sampled frames").first.wait_for()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=DOCS / "serve-answers.png")
        kept = page.get_by_text("What was kept").first
        kept.evaluate("element => element.scrollIntoView()")
        page.wait_for_timeout(500)
        page.screenshot(path=DOCS / "serve-kept.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
