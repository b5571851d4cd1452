"""`python docs/curves_picture.py REPORT.html PICTURE.png`: the curves of a report by `afa report`, or of a page by benchmarks/speed.py, as the docs show them.

Needs Chromium and its driver, and the development tools (pip install -e '.[dev]').
"""

import argparse
import base64
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the browser is driven from
from browsing import Browser

BOX = "const box = arguments[0].getBoundingClientRect(); return [box.left + scrollX, box.top + scrollY, box.width, box.height];"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("report", type=Path)
    flags.add_argument("picture", type=Path)
    given = flags.parse_args()
    browser = Browser()
    try:
        browser.driver.get(given.report.resolve().as_uri())
        drawings = [svg for svg in browser.all("svg") if svg.find_elements("css selector", "polyline.curve")]
        if not drawings:
            sys.exit(f"{given.report} has no curves; compare at several --guidance or --steps")
        drawing = drawings[0]
        left, top, width, height = browser.driver.execute_script(BOX, drawing)
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1.5}
        asked = {"clip": clip, "captureBeyondViewport": True, "format": "png"}
        found = browser.driver.execute_cdp_cmd("Page.captureScreenshot", asked)
        label = drawing.get_attribute("aria-label")
    finally:
        browser.close()
    given.picture.write_bytes(base64.b64decode(found["data"]))
    print(f"{given.picture}: {label}")


if __name__ == "__main__":
    main()
