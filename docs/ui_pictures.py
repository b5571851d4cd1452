"""`python docs/ui_pictures.py [FOLDER]`: pictures of the page, from a page that runs; ui.png and ui-phone.png, and with a FOLDER more to look at.

Needs Chromium and its driver, and the development tools (pip install -e '.[dev]').
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # where the browser is driven from
from browsing import PHONE, Browser  # noqa: E402

from afa.webui.serve import serving  # noqa: E402
from afa.webui.settings import UiSettings  # noqa: E402

PROMPT = "a red star left of a blue ring on a dotted mint background"
METHODS = ("AFA", "curves alone", "patterns alone", "Noise average", "MagicFusion", "SuperDiff OR")
TARGET = ROOT / "docs" / "images"
WIDE = (1400, 1240)  # as high as the results and the weights


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("folder", type=Path, nargs="?", help="where more pictures go, to look at")
    more = flags.parse_args().folder
    with tempfile.TemporaryDirectory() as gallery, serving(UiSettings(output=gallery)) as served:
        browser = Browser()
        try:
            for size, theme in ((WIDE, "light"), (PHONE, "light"), (WIDE, "dark"), (PHONE, "dark")):
                _before(browser, served.url, size, theme, more)
                _after(browser, size, theme, more)
        finally:
            browser.close()
    print(f"ui.png and ui-phone.png in {TARGET}")


def _before(browser: Browser, url: str, size: tuple[int, int], theme: str, more: Path | None) -> None:
    browser.resize(size)
    browser.open(url, theme)
    _keep(browser, more, f"{theme}-{size[0]}-before.png")


def _after(browser: Browser, size: tuple[int, int], theme: str, more: Path | None) -> None:
    """Six methods from the same noise; the ensemble's weights late and deep, where its experts share the picture."""
    browser.write("#afa-prompt textarea", PROMPT)
    methods = METHODS[:2] if size == PHONE else METHODS
    browser.choose(*methods)
    browser.create()
    browser.wait(lambda: len(browser.drawn("#afa-results")) == len(methods) and len(browser.drawn("#afa-weights")) == 5)
    browser.move("#afa-step", 12)
    browser.move("#afa-stage", 8)
    browser.wait(lambda: "step 12" in browser.text("#afa-weights") and "stage OUT02" in browser.text("#afa-weights"))
    start = "#afa-status" if size == PHONE else "body"
    browser.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", start)
    _keep(browser, more, f"{theme}-{size[0]}-after.png")
    if theme == "light":
        TARGET.mkdir(exist_ok=True)
        browser.driver.save_screenshot(str(TARGET / ("ui-phone.png" if size == PHONE else "ui.png")))


def _keep(browser: Browser, more: Path | None, name: str) -> None:
    if more is not None:
        more.mkdir(parents=True, exist_ok=True)
        browser.driver.save_screenshot(str(more / name))


if __name__ == "__main__":
    main()
