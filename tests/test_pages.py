"""Laws of all reports: one design, labels that lie on nothing, nothing wider than a phone, dark where the screen is dark."""

import re
from html import unescape
from itertools import combinations

import numpy as np
import pytest
from browsing import CHROMIUM, DRIVER, PHONE, WIDE, Browser
from made_pages import LONG, PAGES, STAGES, screening_facts

from afa.pages import charts
from afa.pages.charts import TICK, Curve, CurvePoint
from afa.pages.labels import LINE, shortened, stacked, thinned, width_of
from afa.pictures import font
from afa.screening.report import chart

NAMES = ["photo", "paint-merge-v2", LONG, "anime"]
TEXT = re.compile(r'<text x="([\d.-]+)" y="([\d.-]+)" class="([\w ]+)" text-anchor="(\w+)">(.*?)</text>')
COLLISIONS = """
const found = [];
for (const svg of document.querySelectorAll('svg')) {
  const own = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].filter(one => one.checkVisibility()).map(one => [one.textContent, one.getBoundingClientRect()]);
  boxes.forEach(([words, box], place) => {
    if (svg.classList.contains('plot') && (box.left < own.left - 1 || box.right > own.right + 1 || box.top < own.top - 1 || box.bottom > own.bottom + 1))
      found.push(words + ' is cut off');
    for (const [others, other] of boxes.slice(0, place))
      if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 1 && Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 2.5)
        found.push(words + ' lies on ' + others);
  });
}
return found;"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name, make in PAGES.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = make(folder, NAMES, STAGES["flux"])
        (folder / "page.html").write_text(found[name])
    return found


def test_all_reports_have_the_same_frame_and_begin_with_the_advice(pages):
    styles = {re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1] for page in pages.values()}
    assert len(styles) == 1
    for name, page in pages.items():
        tags = re.findall(r"<(header|h1|main|nav|section|footer)\b", page)
        assert tags[:3] == ["header", "h1", "main"] and tags[-1] == "footer", name
        assert page.index('class="advice"') < page.index("<nav") < page.index("<section"), name
        assert re.search(r'<main>\s*<div class="advice"><p class="lead">[^<]+</p>', page), name
        assert re.search(rf"Made by afa [\d.]+: <code>afa {'report' if name == 'evaluate' else name}</code>", page), name
        assert "<b>a_merge" not in page and "<script" not in page, name


def boxes(drawn: str) -> list[tuple[float, float, float, float, str]]:
    """Where the texts of a plot stand, by a real font's widths."""
    found = []
    for x, y, kind, anchor, escaped in TEXT.findall(drawn):
        words = unescape(escaped)
        size = 12 if kind.split()[0] in ("tick", "axis") else 12.5
        long = font(100).getlength(words) * size / 100
        left = float(x) - {"start": 0, "middle": long / 2, "end": long}[anchor]
        found.append((left, float(y) - 9, left + long, float(y) + 2, words))
    return found


def collisions(drawn: str) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, and texts that are cut off."""
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups())
    found = [(words, "the border") for left, top, right, low, words in boxes(drawn) if left < 0 or top < 0 or right > width or low > height]
    for one, other in combinations(boxes(drawn), 2):
        if min(one[2], other[2]) - max(one[0], other[0]) > 0 and min(one[3], other[3]) - max(one[1], other[1]) > 0:
            found.append((one[4], other[4]))
    return found


@pytest.mark.parametrize("family", STAGES)
def test_labels_of_a_chart_over_stages_lie_on_nothing(family):
    facts = screening_facts(NAMES, STAGES[family])
    for name in ("features", "weights"):
        drawn = chart(name, facts)
        assert collisions(drawn) == []
        ticks = [words for *_, words in boxes(drawn) if words in {shortened(stage, TICK) for stage in STAGES[family]}]
        assert (3 if family == "long names" else 6) <= len(ticks) < len(STAGES[family])


@pytest.mark.parametrize("lines", [1, 6, 40])
def test_names_beside_curves_lie_on_nothing_whatever_their_number(lines):
    points = [CurvePoint(x, 0.5, 0.4, 0.6, "") for x in (10, 11, 12, 50)]
    drawn = [Curve(f"method {index} of {LONG}", "merge", points) for index in range(lines)]
    places = {float(x): str(x) for x in (10, 11, 12, 50)}
    assert collisions(charts.curves(drawn, places, "denoising steps", "a metric with a very long name " * 3, "")) == []


def test_the_check_finds_labels_that_do_lie_on_each_other():
    drawn = charts.drawing(100, 50, [charts.text(10, 20, "one"), charts.text(14, 22, "two"), charts.text(90, 40, "three")], "")
    assert ("one", "two") in collisions(drawn) and ("three", "the border") in collisions(drawn)


def test_an_axis_keeps_every_label_that_has_room():
    few = {50.0 * place: f"IN{place:02d}" for place in range(8)}
    assert thinned(few) == few and thinned({}) == {}
    many = {8.0 * place: f"IN{place:02d}" for place in range(60)}
    assert list(thinned(many)) == list(many)[:: len(many) // len(thinned(many))]
    assert thinned({0.0: "x" * 40, 1.0: "y" * 40}) == {0.0: "x" * 40}


def test_stacked_lines_stay_in_place_where_there_is_room_and_are_apart_where_there_is_none():
    assert stacked([20, 60, 200], 14, 334) == [20, 60, 200]
    assert stacked([300, 330, 334], 14, 334)[-1] == 334
    for heights in ([100.0] * 5, [330.0] * 22, list(np.linspace(14, 334, 60))):
        assert np.diff(stacked(heights, 14, 334)).min() > LINE


def test_the_width_of_a_label_is_not_taken_for_less_than_it_is():
    for words in ("OUT11", "MMMM", "a red star", "写真モデル", shortened(LONG)):
        assert width_of(words) >= font(12).getlength(words) * 0.98, words
    assert len(shortened(LONG)) == 40 and shortened("short") == "short"


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium or no chromedriver on this machine")
    made = Browser()
    yield made
    made.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_on_a_screen_nothing_is_too_wide_collides_or_glares(browser, pages, tmp_path, size, dark):
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page)
        browser.resize(size)
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        browser.driver.get((tmp_path / f"{name}.html").as_uri())
        assert browser.overflow() <= 0, name
        assert browser.driver.execute_script(COLLISIONS) == [], name
        ground = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 64) == dark, name
        shown = browser.driver.execute_script(
            "return [...document.querySelectorAll('picture')].map(one => [one.querySelector('img').currentSrc, one.querySelector('source').srcset])"
        )
        assert all((current == twin) == dark for current, twin in shown if current), name
        assert bool(shown) == (name in ("demo", "explain")), name
