"""Every number of a report as CSV, long: a line for each method, metric and other method it is compared with."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from afa.evaluation.columns import Column, Comparison
from afa.evaluation.compare import Analysis
from afa.evaluation.results import Method
from afa.evaluation.statistics import Estimate
from afa.shareable import csv_cell

HEADERS = (
    "evaluation method title group study of training_seeds metric kind higher_is_better leading prompts value low high n"
    " versus shared_seeds diff diff_low diff_high win win_low win_high p p_holm verdict trained_parameters training_steps"
    " seconds seconds_low seconds_high seconds_n memory_mb"
).split()


def as_csv(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """Columns as in HEADERS; empty where there is nothing. A method that is compared with nobody has one line a metric."""
    target = io.StringIO()
    writer = csv.DictWriter(target, HEADERS, restval="", lineterminator="\n")
    writer.writeheader()
    for name, one in zip(names, several, strict=True):
        writer.writerows({key: csv_cell(value) for key, value in {"evaluation": name, **line}.items()} for line in _lines(one))
    return target.getvalue()


def _lines(one: Analysis) -> Iterator[dict[str, Any]]:
    for column in one.columns.values():
        for method in [*one.rows, *(method for method in one.results.methods if method.axes)]:
            if method.name in column.values:
                yield from _of_method(one, column, method)


def _of_method(one: Analysis, column: Column, method: Method) -> Iterator[dict[str, Any]]:
    shared = {**_about(one, method), **_score(one, column, method)}
    compared = [found for found in column.comparisons.values() if found.method == method.name]
    yield from ({**shared, **_versus(found)} for found in compared)
    if not compared:
        yield shared


def _about(one: Analysis, method: Method) -> dict[str, Any]:
    known = [run.memory_mb for run in method.runs if run.memory_mb is not None]
    return {
        "method": method.name,
        "title": method.title,
        "group": method.group,
        "study": "; ".join(f"{axis}={value}" for axis, value in method.axes.items()),
        "of": method.of,
        "trained_parameters": method.trained_parameters,
        "training_steps": method.training_steps,
        "memory_mb": max(known, default=""),
        **(_named("seconds", one.seconds[method.name], n=True) if method.name in one.seconds else {}),
    }


def _score(one: Analysis, column: Column, method: Method) -> dict[str, Any]:
    found = column.values[method.name]
    return {
        "training_seeds": len(column.samples[method.name].seeds),
        "metric": column.metric,
        "kind": column.note.kind,
        "higher_is_better": int(column.note.higher_is_better),
        "leading": int(column in one.primary),
        "prompts": column.samples[method.name].prompts,
        "value": found.value,
        "low": _end(found, found.low),
        "high": _end(found, found.high),
        "n": found.n,
    }


def _versus(found: Comparison) -> dict[str, Any]:
    return {
        "versus": found.other,
        "shared_seeds": len(found.seeds) or "",
        **_named("diff", found.difference),
        **(_named("win", found.wins) if found.wins is not None else {}),
        "p": found.p,
        "p_holm": "" if found.p_holm is None else found.p_holm,
        "verdict": found.verdict,
    }


def _named(name: str, found: Estimate, n: bool = False) -> dict[str, Any]:
    ends = {f"{name}_low": _end(found, found.low), f"{name}_high": _end(found, found.high)}
    return {name: found.value, **ends, **({f"{name}_n": found.n} if n else {})}


def _end(found: Estimate, end: float) -> float | str:
    """Of an interval; empty where there is none."""
    return end if found.has_interval else ""
