"""Pictures: the first prompts by every method, and the prompts where our method wins or loses most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from afa.evaluation.columns import Column
from afa.evaluation.compare import RIVALS, Analysis
from afa.evaluation.report.markup import key, scrolling
from afa.evaluation.report.numbers import decimals, number
from afa.evaluation.report.thumbnails import Thumbnails
from afa.evaluation.results import Method, prompts_of

ROWS = 6  # prompts of the sheets
COLUMNS = 9  # methods beside our own in one sheet
CASES = 4  # wins, and losses


@dataclass(frozen=True)
class Case:
    """One image by two methods, with the scores of these very images."""

    index: int
    ours: float
    other: float


def sheets(one: Analysis, pictures: Thumbnails) -> str:
    """The first image of the first prompts, a row each, a column a method; our own is repeated in every sheet."""
    methods = [method for method in one.rows if pictures.available(method)]
    ours = [method for method in methods if method.name == one.ours]
    others = [method for method in methods if method.name != one.ours]
    count = max(1, math.ceil(len(others) / COLUMNS))
    ends = [round(len(others) * part / count) for part in range(count + 1)]  # sheets of about the same width
    return "".join(_sheet(one, [*ours, *others[start:end]], pictures) for start, end in pairwise(ends)) if methods else ""


def shown_items(one: Analysis) -> list[int]:
    """The first image of each of the first prompts."""
    firsts: dict[int, int] = {}
    for index, item in enumerate(one.results.items):
        firsts.setdefault(item.prompt, index)
    return list(firsts.values())[:ROWS]


def cases(one: Analysis, column: Column, other: str, pictures: Thumbnails) -> str:
    """The largest wins and losses of our method against another, image by image, at most one a prompt."""
    assert one.ours is not None
    found = extreme_cases(one, column, other)
    parts = []
    for words, chosen in (("furthest ahead of", found[0]), ("furthest behind", found[1])):
        shown = "".join(_case(one, column, other, case, pictures) for case in chosen)
        parts.append(f"<h4>{escape(f'{one.title(one.ours)} {words} {one.title(other)}')}</h4>")
        parts.append(f'<div class="cases">{shown}</div>' if shown else "<p>On no image.</p>")
    return "".join(parts)


def extreme_cases(one: Analysis, column: Column, other: str) -> tuple[list[Case], list[Case]]:
    """Wins and losses, the largest first, by the first training seed that both have; equal scores are neither."""
    found = column.against(str(one.ours), other)
    if found is None:
        return [], []
    ours, against = (_scores(one.methods[name], column.metric, found.seeds) for name in (str(one.ours), other))
    every = [Case(index, mine, its) for index, (mine, its) in enumerate(zip(ours, against, strict=False)) if mine != its]
    sign = 1 if column.note.higher_is_better else -1
    every.sort(key=lambda case: (-sign * (case.ours - case.other), case.index))
    wins = [case for case in every if sign * (case.ours - case.other) > 0]
    losses = [case for case in reversed(every) if sign * (case.ours - case.other) < 0]
    return _one_a_prompt(one, wins), _one_a_prompt(one, losses)


def opponents(one: Analysis, column: Column) -> list[str]:
    """The best single expert and the best rival, by value."""
    found = [column.best, column.leader(one.group(*RIVALS))]
    return [name for name in found if name is not None and one.methods[name].runs[0].images]


def _one_a_prompt(one: Analysis, cases: Sequence[Case]) -> list[Case]:
    firsts: dict[int, Case] = {}
    prompts = prompts_of(one.results.items)
    for case in cases:
        firsts.setdefault(prompts[case.index], case)
    return list(firsts.values())[:CASES]


def _scores(method: Method, metric: str, seeds: Sequence[int]) -> list[float]:
    """Of the first of these training seeds, or of what is not trained."""
    runs = {run.seed: run for run in method.runs}
    run = runs[seeds[0]] if seeds and method.is_trained else method.runs[0]
    return run.scores.get(metric, [])


def _sheet(one: Analysis, methods: Sequence[Method], pictures: Thumbnails) -> str:
    head = "".join(f'<th scope="col">{key(method.group)}<br>{escape(method.title)}</th>' for method in methods)
    rows = []
    for index in shown_items(one):
        item = one.results.items[index]
        cells = "".join(f"<td>{pictures.html(method, index, f'{method.title}: {item.caption}')}</td>" for method in methods)
        rows.append(f'<tr><th scope="row">{escape(item.caption)}<br><small>seed {item.seed}</small></th>{cells}</tr>\n')
    table = f'<table class="sheet"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return scrolling(table, f"The first prompts by {', '.join(method.title for method in methods)}")


def _case(one: Analysis, column: Column, other: str, case: Case, pictures: Thumbnails) -> str:
    """Two pictures side by side with their scores; a score here is one image's, no estimate."""
    item = one.results.items[case.index]
    places = decimals(list(column.values.values()))
    sides = []
    for name, score in ((str(one.ours), case.ours), (other, case.other)):
        method = one.methods[name]
        image = pictures.html(method, case.index, f"{method.title}: {item.caption}")
        sides.append(f"<div>{image}<span>{escape(method.title)}<br><b>{number(score, places)}</b></span></div>")
    apart = number(case.ours - case.other, places, True)
    words = f"{escape(item.caption)} <small>seed {item.seed}, difference {apart}</small>"
    return f'<figure><div class="pair">{"".join(sides)}</div><figcaption>{words}</figcaption></figure>'
