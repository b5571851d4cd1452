"""A real headless Chromium, driven over a page of `afa ui`."""

import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

os.environ["SE_OFFLINE"] = "true"  # selenium must not look for a driver elsewhere
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-dev-shm-usage --hide-scrollbars --disable-component-update --disable-sync""".split()
WIDE, PHONE = (1400, 1000), (390, 844)
# A run of pictures that are there already is over between two looks at the button, so its changes are counted.
COUNT_RUNS = """
window.afaRuns = 0;
new MutationObserver(() => { window.afaRuns += 1; }).observe(document.querySelector("#afa-run"), {attributes: true, attributeFilter: ["disabled"]});
"""
MOVE = """const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set; set.call(arguments[0], arguments[1]);
    arguments[0].dispatchEvent(new Event('input', {bubbles: true})); arguments[0].dispatchEvent(new Event('pointerup', {bubbles: true}));"""


class Browser:
    """One window. size: width and height in pixels. Closed by close()."""

    def __init__(self, size: tuple[int, int] = WIDE) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.resize(size)

    def close(self) -> None:
        self.driver.quit()

    def resize(self, size: tuple[int, int]) -> None:
        """As a phone where it is narrow."""
        shape = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)

    def open(self, url: str, theme: str = "light") -> None:
        """Load the page anew, and wait until it can be used."""
        self.driver.get(f"{url}/?__theme={theme}")
        self.wait(lambda: self.find("#afa-prompt textarea").is_displayed())
        self.wait(lambda: self.driver.execute_script("return document.readyState") == "complete")

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """What the condition answers, once it is something."""
        end, failure = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                found = condition()
                if found:
                    return found
            except WebDriverException as error:  # not there yet
                failure = error
            time.sleep(0.05)
        raise TimeoutError(f"the page did not come to it in {seconds} s; status: {self.text('#afa-status')}") from failure

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def write(self, selector: str, text: str) -> None:
        """In place of what was there."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, *titles: str) -> None:
        """These methods and no others."""
        for label in self.all("#afa-methods label"):
            box = label.find_element(By.CSS_SELECTOR, "input")
            if box.is_selected() != (label.text in titles):
                label.click()

    def press(self, selector: str) -> None:
        button = self.wait(lambda: next((one for one in self.all(selector) if one.is_enabled()), None))
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def tab(self, name: str) -> None:
        next(one for one in self.all("button[role=tab]") if one.text == name).click()

    def move(self, selector: str, value: float, place: int = 0) -> None:
        """A slider, let go of at a value."""
        slider = self.all(f"{selector} input[type=range]")[place]
        self.driver.execute_script(MOVE, slider, str(value))

    def create(self, end: str = "Done") -> None:
        """Press the button, wait for the end and for what follows it."""
        self.driver.execute_script(COUNT_RUNS)
        self.press("#afa-run")
        self.wait(lambda: self.driver.execute_script("return window.afaRuns"))
        self.wait(lambda: end in self.text("#afa-status") and self.find("#afa-run").is_enabled())

    def drawn(self, selector: str) -> list[int]:
        """How wide the pictures there are, in their own pixels; 0: not loaded."""
        return [int(one.get_property("naturalWidth") or 0) for one in self.all(f"{selector} img")]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth"))

    def requests(self) -> list[str]:
        """Every address that was asked for since the last call, those of data in the page left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:", "about:"))]

    def failures(self) -> list[str]:
        """What the browser's console says was refused, broken or blocked."""
        messages = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in messages if any(word in message for word in ("Failed to load", "Content Security Policy", "net::"))]
