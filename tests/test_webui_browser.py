"""The page as people meet it: a real headless Chromium types, moves, cancels and breaks, on a wide window and on a phone."""

import re
import socket

import pytest
from webui_engine import HARMFUL, PROMPT

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
pytest.importorskip("selenium", reason="selenium drives the browser; it is not installed")
from browsing import CHROMIUM, DRIVER, PHONE, WIDE, Browser
from PIL import Image

from afa.webui.serve import serving
from afa.webui.settings import UiSettings

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver on this machine")
# A stroke from the upper left to the middle, as a finger makes it.
STROKE = """const box = arguments[0].getBoundingClientRect();
const send = (kind, share) => arguments[0].dispatchEvent(new PointerEvent(kind, {bubbles: true, pointerId: 1, buttons: 1,
    clientX: box.left + share * box.width, clientY: box.top + share * box.height}));
arguments[0].setPointerCapture = () => {};
send("pointerdown", 0.1); send("pointermove", 0.3); send("pointermove", 0.6); send("pointerup", 0.6);"""
# Texts whose colour has less than 4.5 : 1 to what they stand on (WCAG 2, AA).
CONTRAST = """const light = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    const part = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return [0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b), a]; };
const under = (node) => {
  for (; node; node = node.parentElement) { const [y, a] = light(getComputedStyle(node).backgroundColor); if (a > 0.5) return y; }
  return 1;
};
return [...document.querySelectorAll(arguments[0])].flatMap((part) => [...part.querySelectorAll("*")]).filter((node) => node.offsetParent && !node.disabled
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())).filter((node) => {
    const [a, b] = [light(getComputedStyle(node).color)[0], under(node)]; return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5; })
    .map((node) => node.textContent.trim().slice(0, 40));"""
# Where the pictures of a row that scrolls stand: its own place and width, and each picture's left side and width.
ROW = """const row = document.querySelector(arguments[0]);
return [row.scrollLeft, row.scrollWidth - row.clientWidth, [...row.querySelectorAll(arguments[1])].map((one) => { const box = one.getBoundingClientRect();
    return [box.left, box.width]; })];"""
REPORT = "<html><body><h1>A report</h1><script>document.title='owned'</script></body></html>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def url(place):
    (place / "compared.html").write_text(REPORT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = UiSettings(output=str(place / "gallery"), device="cpu", port=port, reports=[str(place / "compared.html")])
    with serving(settings) as served:
        yield served.url


@pytest.fixture(scope="module")
def window():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(window, url):
    """Loaded anew, with few steps."""
    loaded(window, url, WIDE)
    steps(window, 3)
    return window


def loaded(window, url, size, theme="light"):
    """The page, loaded anew."""
    window.resize(size)
    window.open(url, theme)
    return window


def steps(page, count):
    page.move("#afa-steps", count)


def test_a_prompt_two_methods_and_their_weights(page):
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("AFA", "curves alone")
    page.create()
    assert page.wait(lambda: page.drawn("#afa-results") == [64, 64])
    assert [one.text for one in page.all("#afa-results h4")] == ["AFA", "curves alone"]
    assert page.wait(lambda: page.drawn("#afa-weights") == [64] * 5)
    assert "mean over all steps; mean over 9 stages" in page.text("#afa-weights")
    page.move("#afa-step", 2)
    page.wait(lambda: "step 2 of 3" in page.text("#afa-weights"))
    page.move("#afa-stage", 5)
    page.wait(lambda: "stage M00" in page.text("#afa-weights"))
    steps(page, 1)
    page.create()
    page.wait(lambda: "step 1 of 1, t = " in page.text("#afa-weights") and "stage M00" in page.text("#afa-weights"))


def test_a_strength_that_is_moved_draws_again(page):
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("AFA", "curves alone")
    page.create()
    page.wait(lambda: "curves" in page.text("#afa-weights"))
    page.move(".afa-strength", 0)
    page.wait(lambda: page.all("#afa-weights .afa-value") and page.text("#afa-weights .afa-value") == "0 %")
    assert [one.text for one in page.all("#afa-results .afa-under")][1] == "already there"
    for place in (1, 2):
        page.move(".afa-strength", 0, place)
    page.wait(lambda: "are turned off; give at least one a strength above 0" in page.text("body"))


def test_a_run_is_cancelled_and_another_one_works(page):
    steps(page, 90)
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("AFA", "MagicFusion", "SuperDiff OR")
    page.press("#afa-run")
    page.wait(lambda: re.search(r"step \d+ of 90", page.text("#afa-status")))
    page.press("#afa-cancel")
    page.wait(lambda: page.text("#afa-status").startswith("Cancelled: 0 pictures"), seconds=5)
    steps(page, 3)
    page.choose("angles alone")
    page.create()
    assert page.wait(lambda: page.drawn("#afa-results") == [64])


def test_broken_input_is_a_sentence_and_the_page_goes_on(page):
    page.press("#afa-run")
    page.wait(lambda: "There is no prompt; write what the image should show" in page.text("body"))
    page.write("#afa-prompt textarea", PROMPT)
    page.choose()
    page.press("#afa-run")
    page.wait(lambda: "No method is chosen; choose at least one" in page.text("body"))
    page.choose("curves alone")
    page.create()
    assert page.wait(lambda: page.drawn("#afa-results") == [64])


def test_a_prompt_is_text_wherever_it_is_shown(page):
    page.write("#afa-prompt textarea", HARMFUL)
    page.choose("AFA")
    page.create()
    page.wait(lambda: page.drawn("#afa-results") == [64])
    page.tab("Gallery")
    page.wait(lambda: page.all("#afa-gallery img"))
    page.press("#afa-gallery button:has(img)")
    page.wait(lambda: HARMFUL in page.text("#afa-chosen"))
    assert page.driver.title.startswith("afa") and not page.all("img[src='x']")


def test_settings_come_back_from_the_gallery_and_from_a_file(page, place):
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("patterns alone")
    page.create()
    page.open(page.driver.current_url.partition("/?")[0])
    page.tab("Gallery")
    page.wait(lambda: page.all("#afa-gallery img"))
    page.press("#afa-gallery button:has(img)")
    page.wait(lambda: "steps" in page.text("#afa-chosen"))
    page.press("#afa-use")
    page.wait(lambda: page.find("#afa-prompt textarea").is_displayed() and page.find("#afa-prompt textarea").get_property("value") == PROMPT)
    assert [one.text for one in page.all("#afa-methods label") if one.find_element("css selector", "input").is_selected()] == ["patterns alone"]
    Image.new("RGB", (8, 8)).save(place / "foreign.png")
    page.tab("Gallery")
    page.find("#afa-upload input[type=file]").send_keys(str(place / "foreign.png"))
    page.wait(lambda: "foreign.png does not say how it was made" in page.text("body"))


def test_reports_are_shown_and_run_nothing(page):
    page.tab("Reports")
    frame = page.wait(lambda: page.find("iframe.afa-report"))
    page.driver.switch_to.frame(frame)
    page.wait(lambda: page.text("h1") == "A report")
    page.driver.switch_to.default_content()
    assert page.driver.title.startswith("afa")



def swipe(page, selector):
    """By less than a picture, as a finger does, to the left."""
    row = "arguments[0].scrollIntoView({block: 'center'}); const box = arguments[0].getBoundingClientRect(); return box.top + box.height / 2"
    height = page.driver.execute_script(row, page.find(selector))
    for kind, *places in ("touchStart", 300), ("touchMove", *range(290, 80, -15), 80, 80, 80), ("touchEnd",):
        for place in places or [None]:
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": place, "y": height}] if place else []})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_pictures_are_swiped_one_by_one_and_stay_in_place_while_others_are_drawn(window, url, theme):
    page = loaded(window, url, PHONE, theme)
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("curves alone", "MagicFusion", "patterns alone")
    steps(page, 2)
    page.create()
    for number in (1, 2):
        swipe(page, "#afa-results")
        page.wait(lambda number=number: round(page.driver.execute_script(ROW, "#afa-results", ".afa-pictures > *")[2][number][0]) == 16)
    before, more, pictures = page.driver.execute_script(ROW, "#afa-results", ".afa-pictures > *")
    assert more >= before > 0 and all(0.85 * PHONE[0] < width < 0.95 * PHONE[0] for _, width in pictures)
    steps(page, 4)
    page.create()
    assert page.driver.execute_script(ROW, "#afa-results", ".afa-pictures > *")[0] == before and page.overflow() <= 0
    page.tab("Gallery")
    page.wait(lambda: len(page.all("#afa-gallery img")) > 1)
    swipe(page, "#afa-gallery")
    page.wait(lambda: round(page.driver.execute_script(ROW, "#afa-gallery .grid-wrap", ".gallery-item")[2][1][0]) == 16)
    before, _, pictures = page.driver.execute_script(ROW, "#afa-gallery .grid-wrap", ".gallery-item")
    assert all(0.85 * PHONE[0] < width < 0.95 * PHONE[0] for _, width in pictures)
    page.press("#afa-gallery .gallery-item:nth-child(2) button")
    page.wait(lambda: "steps" in page.text("#afa-chosen"))
    assert page.driver.execute_script(ROW, "#afa-gallery .grid-wrap", ".gallery-item")[0] == before and page.overflow() <= 0


def test_on_a_wide_window_nothing_is_swiped(page):
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("curves alone", "MagicFusion", "SuperDiff OR")
    page.create()
    page.wait(lambda: page.drawn("#afa-results") == [64] * 3)
    _, more, pictures = page.driver.execute_script(ROW, "#afa-results", ".afa-pictures > *")
    assert more == 0 and len({left for left, _ in pictures}) == 3 and all(left + width < WIDE[0] for left, width in pictures)
    page.tab("Gallery")
    page.wait(lambda: len(page.all("#afa-gallery img")) > 3)
    _, more, pictures = page.driver.execute_script(ROW, "#afa-gallery .grid-wrap", ".gallery-item")
    assert more == 0 and len({left for left, _ in pictures}) == 4


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(window, url, theme):
    page = loaded(window, url, PHONE, theme)
    steps(page, 2)
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("AFA", "curves alone", "MagicFusion")
    page.create()
    page.wait(lambda: page.drawn("#afa-weights") == [64] * 5)
    for name in ("Create", "Gallery", "Reports", "About"):
        page.tab(name)
        page.wait(lambda: page.overflow() <= 0, seconds=3)


def test_regions_seeds_and_options_work_by_hand(page):
    page.write("#afa-prompt textarea", PROMPT)
    page.choose("AFA", "MagicFusion")
    page.wait(lambda: any(one.is_displayed() and "MagicFusion" in one.text for one in page.all(".afa-options")))
    page.press("#afa-regions > button")
    page.wait(lambda: page.find(".afa-canvas canvas").is_displayed())
    page.press(".afa-brushes button[data-paint=left]")
    page.press("#afa-add-region")
    page.wait(lambda: "curves × 0 in 50% of the picture, all steps" in page.text("#afa-region-list"))
    page.driver.execute_script(STROKE, page.find(".afa-canvas canvas"))
    page.press("#afa-add-region")
    page.wait(lambda: len(page.all("#afa-region-list li")) == 2)
    painted = re.search(r"in (\d+)% of the picture", page.all("#afa-region-list li")[1].text)
    assert painted and 5 < int(painted[1]) < 40
    page.press("#afa-remove-region")
    page.wait(lambda: len(page.all("#afa-region-list li")) == 1)
    page.press("#afa-random")
    page.wait(lambda: page.find("#afa-seed-row textarea, #afa-seed-row input").get_property("value") == "-1")
    page.create()
    assert page.wait(lambda: page.drawn("#afa-results") == [64, 64])
    page.press("#afa-last")
    drawn = page.wait(lambda: (seed := page.find("#afa-seed-row textarea, #afa-seed-row input").get_property("value")) != "-1" and seed)
    assert f"seed {drawn}" in page.find("#afa-results a").get_attribute("title")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_new_controls_fit_and_can_be_read_on_a_phone_and_in_a_wide_window(window, url, theme):
    page = loaded(window, url, PHONE, theme)
    page.press("#afa-regions > button")
    page.wait(lambda: page.find(".afa-canvas canvas").is_displayed())
    page.press(".afa-brushes button[data-paint=top]")
    page.press("#afa-add-region")
    page.wait(lambda: page.all("#afa-region-list li"))
    for size in (PHONE, WIDE):
        page.resize(size)
        assert page.overflow() <= 0
        assert page.find(".afa-canvas canvas").is_displayed() and page.all("#afa-region-list li")
        unreadable = page.driver.execute_script(CONTRAST, "#afa-regions, #afa-seed-row")
        assert unreadable == []
    page.tab("Gallery")
    for size in (WIDE, PHONE):
        page.resize(size)
        page.wait(lambda: page.overflow() <= 0, seconds=3)


def test_the_page_asks_nobody_else_and_is_given_all_it_asks_for(page, url):
    """Of all that the tests above made it do, too."""
    asked = page.requests()
    assert len(asked) > 10 and [one for one in asked if not one.startswith(url)] == []
    assert page.failures() == []
