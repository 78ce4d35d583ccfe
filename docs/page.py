"""Takes docs/page.png and docs/page-steps.png, the README's pictures of the page: `python docs/page.py`.

A real server with the embedded `tiny`, a real browser (chromium, by playwright).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

QUESTION = "Tell a short story about Mia and a red boat."
SIZE = {"width": 960, "height": 700}


def main() -> None:
    command = [sys.executable, "-m", "dgemma", "serve", "tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                shoot(browser, url, "light", Path(__file__).with_name("page.png"), finished=False)
                shoot(browser, url, "dark", Path(__file__).with_name("page-steps.png"), finished=True)
                browser.close()
        finally:
            server.terminate()


def shoot(browser, url: str, scheme: str, path: Path, finished: bool) -> None:  # type: ignore[no-untyped-def]
    """The page while an answer comes out of noise, or the steps of a finished one."""
    page = browser.new_page(viewport=SIZE, color_scheme=scheme, bypass_csp=True)
    page.goto(url)
    page.wait_for_function("document.getElementById('model').textContent")
    page.fill("#input", QUESTION)
    page.keyboard.press("Enter")
    if not finished:
        page.wait_for_function("/step [6-9]/.test(document.body.textContent)")
    else:
        page.wait_for_function("/seed/.test(document.querySelector('.status').textContent)")
        page.click(".steps summary")
        scrubber = page.get_by_label("Step", exact=True)
        for _ in range(8):
            scrubber.press("ArrowLeft")
        scrubber.scroll_into_view_if_needed()
    page.screenshot(path=path)
    page.close()


if __name__ == "__main__":
    main()
