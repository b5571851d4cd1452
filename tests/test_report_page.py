"""Laws of the report's files: complete in themselves, nothing without interval and n, nothing that was not there."""

import base64
import csv
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_results import made_results, write_results
from PIL import Image

from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.report.files import HEADERS, as_csv, as_markdown, as_text
from afa.evaluation.report.page import as_html, extreme_cases, shown_items, thumbnail
from afa.evaluation.results import Results
from afa.pages.charts import scale, ticks
from afa.pages.labels import LETTER, LINE, Box, place_labels
from afa.pages.numbers import MINUS, decimals, durations, number
from afa.pages.tables import Shown, Table, TableRow
from afa.stats import Estimate

EMPTY = {"meta", "img", "br", "line", "circle", "rect", "path"}  # elements without content


class Checker(HTMLParser):
    """Follows a page's elements; fails where they do not close. seen: every element with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing; open: {self.open}"


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    write_results(folder, prompts=8, copies=2, resamples=60, few=True)
    return folder


@pytest.fixture(scope="module")
def one(folder) -> Analysis:
    return analyse([Results.load(folder)], [folder])[0]


@pytest.fixture(scope="module")
def page(one) -> str:
    return as_html([one], ["scenes"])


def headings(page: str) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", page)


def test_the_page_needs_nothing_else(page):
    found = checked(page).seen
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found}
    sources = [value for _, attributes in found for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert sources and all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_every_link_leads_somewhere_and_every_picture_has_words(page):
    found = checked(page).seen
    names = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(names) == len(set(names))
    assert {attributes["href"][1:] for tag, attributes in found if tag == "a"} <= set(names)
    assert all(attributes.get("alt") for tag, attributes in found if tag == "img")
    plots = [attributes for tag, attributes in found if tag == "svg" and "viewbox" in attributes]
    assert plots and all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in plots)


def test_sections_without_data_are_left_out(tmp_path, page):
    assert {"Quality against steps", "Ablations", "Run by run", "Could not be computed", "The first prompts"} <= set(
        headings(page)
    )
    plain = made_results(prompts=5, copies=1, runs=1, studies=False, resamples=50, few=True)
    untimed = [
        dataclasses.replace(method, trained_parameters=0, runs=[dataclasses.replace(run, seconds=[], memory_mb=None, images="") for run in method.runs])
        for method in plain.methods
    ]  # fmt: skip
    bare = dataclasses.replace(plain, methods=untimed, errors=[], metrics={"attributes": plain.metrics["attributes"]})
    short = as_html(analyse([bare]), ["scenes"])
    assert headings(short) == ["Every method", "Against the best single expert", "How it was made"]
    checked(short)


def test_words_are_never_taken_for_markup(folder):
    results = Results.load(folder)
    evil = "<script>alert('x')</script> & \"quotes\" | *stars*"
    methods = [dataclasses.replace(method, title=f"{method.title} {evil}", note=evil) for method in results.methods]
    items = [dataclasses.replace(item, caption=evil) for item in results.items]
    found = analyse([dataclasses.replace(results, methods=methods, items=items, errors=[evil])], [folder])
    page = as_html(found, [evil])
    checked(page)
    assert "<script" not in page and "&lt;script&gt;alert(" in page
    rows = [line for line in as_markdown(found, [evil]).splitlines() if line.startswith("|")]
    assert rows and all("<script" not in row.replace("\\<", "") for row in rows)


def test_every_estimate_of_a_table_shows_its_interval_and_its_n():
    same, other = Estimate(0.5, 0.25, 0.75, 30), Estimate(0.5, 0.25, 0.75, 7)
    table = Table(["method", "score"], [TableRow(["a", Shown(same)]), TableRow(["b", Shown(same)])])
    assert (table.header(1), table.words(table.rows[0].cells[1], 1)) == ("score [95 %], n = 30", "0.50 [0.25, 0.75]")
    mixed = Table(["method", "score"], [TableRow(["a", Shown(same)]), TableRow(["b", Shown(other, verdict="worse")])])
    assert (mixed.header(1), mixed.words(mixed.rows[1].cells[1], 1)) == ("score [95 %]", "0.50 [0.25, 0.75] (n = 7) ▼")


def test_markdown_tables_are_whole(one):
    text = as_markdown([one], ["scenes"])
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2 + 1 + 3 + 2  # two leading metrics, all metrics, three studies, training and runs
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "**AFA**" in text and one.results.errors[0] in text


def test_csv_has_every_number_of_every_comparison(one):
    rows = list(csv.DictReader(io.StringIO(as_csv([one], ["scenes"]))))
    assert list(rows[0]) == HEADERS and all(row["low"] and row["high"] and int(row["n"]) > 0 for row in rows)
    found = {(row["metric"], row["method"], row["versus"]): row for row in rows}
    assert {(metric, *pair) for metric, column in one.columns.items() for pair in column.comparisons} <= found.keys()
    row, known = found["attributes", "afa", "single:patterns"], one.lead.against("afa", "single:patterns")
    numbers = [float(row[name]) for name in ("diff", "diff_low", "diff_high", "win", "p", "p_holm")]
    difference = known.difference
    assert numbers == [difference.value, difference.low, difference.high, known.wins.value, known.p, known.p_holm]
    assert row["verdict"] == known.verdict and found["frechet", "afa", "single:patterns"]["win"] == ""


def test_text_for_the_terminal_is_a_table_of_all_rows(one):
    text = as_text(one)
    assert all(method.title in text for method in one.rows) and "* AFA " in text and "Could not be computed:" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 130
    values = [line for line in lines[: len(one.rows) + 9] if "[" in line and "%" not in line]
    assert len(values) == len(one.rows) and len({line.index("[") for line in values}) == 1  # numbers stand under each other


def test_sheets_show_the_first_prompts_by_every_method_that_has_images(one, page):
    assert shown_items(one) == [0, 2, 4, 6, 8, 10]
    sheets = re.findall(r'<table class="sheet">.*?</table>', page, re.DOTALL)
    images = sum(sheet.count("<img") for sheet in sheets)
    drawn = [method for method in one.rows if method.runs[0].images]
    assert images == 6 * (len(drawn) - 1 + len(sheets)) and "best of N" not in "".join(sheets)  # ours is in every sheet


def test_missing_and_broken_images_are_said_and_cost_nothing_else(tmp_path):
    folder = tmp_path / "evaluation"
    results = write_results(folder, prompts=4, copies=1, runs=1, studies=False, resamples=50, few=True)
    (folder / "images/afa/seed-0/000001.png").unlink()
    (folder / "images/ties/000002.png").write_bytes(b"no image")
    page = as_html(analyse([results], [folder]), ["scenes"])
    checked(page)
    assert "2 images could not be read (first: " in page and page.count("no image") >= 2


def test_a_report_without_its_folder_has_tables_and_no_pictures(one):
    page = as_html([dataclasses.replace(one, folder=None)], ["scenes"])
    checked(page)
    assert "<img" not in page and "The first prompts" not in page and "Every method" in page


def test_cases_are_the_largest_differences_one_a_prompt(folder):
    results = Results.load(folder)
    scores = {"afa": [0.9, 0.5, 0.2, 0.5, 0.7, 0.6], "single:patterns": [0.1, 0.4, 0.6, 0.5, 0.5, 0.65]}
    methods = [
        dataclasses.replace(method, runs=[dataclasses.replace(method.runs[0], scores={"attributes": scores[method.name]})])
        for method in results.methods
        if method.name in scores
    ]
    small = dataclasses.replace(results, items=results.items[:6], methods=methods)  # prompts 0 0 1 1 2 2
    found = analyse([small])[0]
    wins, losses = extreme_cases(found, found.lead, "single:patterns")
    assert [(case.index, case.ours, case.other) for case in wins] == [(0, 0.9, 0.1), (4, 0.7, 0.5)]
    assert [case.index for case in losses] == [2, 5]


@pytest.mark.parametrize("side", [24, 64, 300])
def test_embedded_pictures_are_small_and_exact_where_they_can_be(tmp_path, side):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = thumbnail(tmp_path / "a.png").removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        shown = np.asarray(image.convert("RGB"))
    assert max(shown.shape) <= 224 and (side > 192 or np.array_equal(shown, pixels))


def test_labels_do_not_lie_on_each_other():
    rng = np.random.default_rng(1)
    for spread in (4.0, 40.0, 300.0):  # from a heap of points to a whole plot
        points = [(300 + rng.uniform(0, spread), 200 + rng.uniform(-1, 1) * min(spread, 180), f"method {k}") for k in range(20)]
        field = Box(60, 10, 1060, 390)
        boxes = [label.box for label in place_labels(points, [], field)]
        assert sum(one.overlap(other) for k, one in enumerate(boxes) for other in boxes[:k]) == 0
        assert all(
            box.overlap(field) == pytest.approx(LETTER * len(words) * LINE)
            for box, (_, _, words) in zip(boxes, points, strict=True)
        )


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.5, 0.93, False), (-14.2, 21.7, False), (3.0, 3.0, False), (0.2, 9.0, True), (20.9, 64.0, True)],
)
def test_ticks_are_few_round_and_within(low, high, log):
    over = scale([low, high], 0, 100, log)
    found = ticks(over)
    assert 3 <= len(found) <= 12 and all(0 <= over(tick) <= 100 for tick in found) and found == sorted(found)
    assert all(len(f"{tick:.6g}".lstrip("-0.").rstrip("0")) <= 4 for tick in found)


def test_numbers_show_two_digits_of_their_interval():
    assert decimals([Estimate(0.5, 0.45, 0.55, 9)]) == 3 and decimals([Estimate(30, 28, 32, 9)]) == 1
    assert decimals([Estimate(900, 700, 1100, 9)]) == 0 and decimals([Estimate(1, 1, 1, 9)]) == 3
    assert (number(-0.0004, 3), number(-0.25, 2, True), number(0.25, 2, True)) == ("0.000", f"{MINUS}0.25", "+0.25")
    assert (durations([118, 124]), durations([4000]), durations([90_000])) == ("121 [118, 124] s", "67 min", "25 h")
