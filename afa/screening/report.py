"""The results of a screening as tables: text for the terminal, and a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.files import write_atomically
from afa.pages import charts
from afa.pages.advice import Advice
from afa.pages.numbers import number
from afa.pages.page import Advised, render
from afa.pages.tables import Shown, Table, TableRow, wrapped
from afa.stats import Estimate

Facts = Mapping[str, Any]
FACTS, PAGE = "screen.json", "report.html"
ONLY_PAGE = "features"  # a table too long for the terminal
COLOURS = (
    "expert",
    "merge",
    "sampling",
    "control",
    "ours",
    "bound",
)  # colour and shape of the pairs of experts


def write(facts: Facts, output: str) -> None:
    """Write screen.json and report.html, each whole or not at all."""
    folder = Path(output)
    write_atomically(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / PAGE, as_html(facts))


def as_html(facts: Facts) -> str:
    """Return the page."""
    given = f"captioned images of {facts['data']}"
    drawn = f"prompts of {facts['prompts']}, drawn by the experts"
    timesteps, draws, pixels = len(facts["timesteps"]), facts["draws"], facts["resolution"]
    probes = f"{timesteps} timesteps an image, {draws} noises each, {pixels} pixels"
    verdict = facts["verdict"]
    reasons = [(reason, ()) for reason in verdict["reasons"]]
    dropped = [(f"without {name}", why) for name, why in verdict["dropped"].items()]
    return render(
        "screening.html",
        heading=f"Screening of {', '.join(expert['name'] for expert in facts['experts'])}",
        advice=Advised(Advice(verdict["headline"]), [*reasons, ("", dropped)]),
        command="afa screen",
        facts=f"{facts['images']} {given if facts['data'] else drawn}; {probes}.",
        docs="docs/screening.md",
        parts=[(name, title, chart(name, facts), table) for name, title, table in all_tables(facts)],
        notes=notes(facts),
    )


def as_text(facts: Facts) -> str:
    """Return text for the terminal: the verdict and its reasons, then the tables that they rest on."""
    verdict = facts["verdict"]
    lines = [verdict["headline"], *(_indented(reason) for reason in verdict["reasons"])]
    lines += [_indented(f"Leave out {name}: {why}.") for name, why in verdict["dropped"].items()]
    parts = ["\n".join(lines)]
    for name, title, table in all_tables(facts):
        if name != ONLY_PAGE:
            parts.append(f"{title}\n{table.text()}" + (f"\n{_indented(table.note)}" if table.note else ""))
    return "\n\n".join([*parts, *(_indented(note) for note in notes(facts))])


def _indented(text: str) -> str:
    return wrapped(text, "  ", "  ")


def notes(facts: Facts) -> list[str]:
    """Return sentences about what could not be measured, and why."""
    found = []
    if isinstance(facts["parameters"], str):
        found.append(f"Weights could not be compared: {facts['parameters']}.")
    if isinstance(facts.get("average"), str):
        found.append(f"The weight average {facts['average']}.")
    found += [
        f"Only predictions can be combined (--placement out): {reason}."
        for reason in facts["only_predictions"]
    ]
    return found


def chart(name: str, facts: Facts) -> str:
    """Draw a curve over the stages for each pair of experts.

    Returns "" for other tables, and for more pairs than there are colours.
    """
    pairs = {"features": facts["features"], "weights": facts["parameters"]}.get(name, ())
    pairs = pairs["pairs"] if isinstance(pairs, Mapping) else pairs
    if not pairs or len(pairs) > len(COLOURS) or len(pairs[0]["stages"]) < 2:
        return ""
    stages = list(pairs[0]["stages"])
    curves = []
    for colour, pair in zip(COLOURS, pairs, strict=False):
        title, values = " and ".join(pair["experts"]), [pair["stages"][stage] for stage in stages]
        tips = (f"{title}, {stage}: {value:.3g}" for stage, value in zip(stages, values, strict=True))
        points = [
            charts.CurvePoint(x, value, value, value, tip)
            for x, (value, tip) in enumerate(zip(values, tips, strict=True))
        ]
        curves.append(charts.Curve(title, colour, points))
    words: dict[float, str] = dict(enumerate(stages))
    what = f"distance of {name}"
    described = f"{what} by stage for {', '.join(curve.name for curve in curves)}"
    return charts.curves(curves, words, "stage", what, described, field=charts.LOW, zero=True)


def all_tables(facts: Facts) -> Sequence[tuple[str, str, Table]]:
    """Return (short name, title, table) of everything that was measured."""
    found: list[tuple[str, str, Table]] = []
    if facts.get("losses") is not None:
        found += [
            ("room", "What could be learnt", room_table(facts)),
            ("foretold", "What training would gain", foretold_table(facts)),
            ("parts", "What each expert adds", parts_table(facts)),
            ("subsets", "The best set of each size", subset_table(facts)),
            ("losses", "Every expert's loss", loss_table(facts)),
        ]
    found.append(("apart", "Where predictions differ", apart_table(facts)))
    if not isinstance(facts["parameters"], str):
        found.append(("weights", "Where weights differ", weights_table(facts)))
    if facts["features"] and facts["features"][0]["stages"]:
        found.append(("features", "Where features differ", feature_table(facts)))
    return found


def loss_table(facts: Facts) -> Table:
    """Return every expert's loss, by band."""
    rows = []
    for name, found in facts["losses"].items():
        shown = [Shown(Estimate(**one)) for one in (found["overall"], *found["bands"])]
        rows.append(
            TableRow([name, *shown, Shown(Estimate(**found["wins"]), share=True)], "", name == facts["best"])
        )
    note = (
        "Mean squared error of the prediction. wins: the share of all elements (channel and place) at which"
        " this expert's error is the least."
    )
    return Table(["expert", "all timesteps", *bands(facts), "wins"], rows, note)


def room_table(facts: Facts) -> Table:
    """Return the head-room and what the same experts could do otherwise, by band."""
    found = {"routed by place: head-room": facts["head_room"], **facts["bounds"]}
    if isinstance(facts["average"], Mapping):
        found["weight average"] = facts["average"]
    rows = [
        TableRow([name, *(share(one) for one in (gain["overall"], *gain["bands"]))], "", place == 0)
        for place, (name, gain) in enumerate(found.items())
    ]
    agreement = [
        f"{share(one['observed'])}; chance {number(100 * one['chance'], 1)}" for one in facts["agreement"]
    ]
    rows.append(TableRow(["winners of two noises agree", None, *agreement]))
    note = (
        f"How much lower the loss is than that of {facts['best']}, the best expert over all timesteps (n ="
        f" {facts['images']} images). Routed: at each place, the expert answers that won most often on the"
        f" other noises (of {facts['draws']}); what depends only on the noise cannot be learnt and is not"
        " counted. Oracles choose by the true error: upper bounds."
    )
    return Table(["answered by", "all timesteps", *bands(facts)], rows, note)


def parts_table(facts: Facts) -> Table:
    """Return what the set would lose without each expert."""
    rows = [TableRow([name, share(found, signed=True)]) for name, found in facts["leave_one_out"].items()]
    note = (
        f"Change of the routed loss without the expert, n = {facts['images']} images; an interval around 0"
        " means that the expert adds nothing."
    )
    return Table(["without", "routed loss"], rows, note)


def subset_table(facts: Facts) -> Table:
    """Return the best set of every size."""
    rows = [
        TableRow([str(one["size"]), ", ".join(one["experts"]), share(one["head_room"])])
        for one in facts["subsets"]
    ]
    note = f"Over the best single expert, n = {facts['images']} images."
    return Table(["experts", "the best of that many", "head-room"], rows, note)


def foretold_table(facts: Facts) -> Table:
    """Return the forecast of the gain of training."""
    titles = {
        "over_best": f"the best expert ({facts['best']})",
        "over_router": "a router on the predictions",
        "over_average": "the weight average",
    }
    rows = [
        TableRow([titles[name], share(found, 0)])
        for name, found in facts["predicted"].items()
        if found is not None
    ]
    sets = facts["predicted"]["over_best"]["sets"]
    note = (
        "How much lower the loss of AFA should be than that of others. This forecast from the head-room rests"
        f" on {sets} sets of the embedded worlds that were screened and trained, in which averaging weights"
        " helps or harms as it does here; the interval held 95 % of them. For large models it is a guess:"
        " measure it."
    )
    return Table(["AFA over", "loss lower by"], rows, note)


def weights_table(facts: Facts) -> Table:
    """Return the distances between the experts' weights."""
    found = facts["parameters"]
    based = found["base"] is not None
    rows = []
    for pair in found["pairs"]:
        most = max(pair["stages"], key=pair["stages"].get)
        alike = None if pair["cosine_of_changes"] is None else number(pair["cosine_of_changes"], 3)
        cells = [
            " and ".join(pair["experts"]),
            _plain(pair["distance"]),
            f"{most}: {_plain(pair['stages'][most])}",
        ]
        rows.append(TableRow([*cells, *([alike] if based else [])]))
    for name, base in (found["base"] or {}).items():
        rows.append(
            TableRow([f"{name} and the base", _plain(base["distance"]), f"cosine {base['cosine']:.6f}", None])
        )
    headers = ["experts", "distance", "most at", *(["changes alike"] if based else [])]
    note = "Distance of the denoisers' weights, relative to their size; 0: the same weights."
    if based:
        note += " changes alike: cosine between the changes that both made to the base."
    return Table(headers, rows, note)


def _plain(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def apart_table(facts: Facts) -> Table:
    """Return the distances between the experts' predictions."""
    pairs = facts["predictions"]
    rows = [
        TableRow([" and ".join(pair["experts"]), *(number(value, 3) for value in pair["bands"])])
        for pair in pairs
    ]
    note = (
        f"Root mean square of the difference, relative to the experts' errors, over {facts['images']} images;"
        " 0: the same predictions, 1.41: errors that have nothing in common."
    )
    return Table(["predictions of", *bands(facts)], rows, note)


def feature_table(facts: Facts) -> Table:
    """Return the distances between the experts' features, stage by stage."""
    pairs = facts["features"]
    rows = [
        TableRow([stage, *(number(pair["stages"][stage], 3) for pair in pairs)])
        for stage in pairs[0]["stages"]
    ]
    note = "Each expert runs by itself; 0: the same features, 1.41: features that have nothing in common."
    return Table(["stage", *(" and ".join(pair["experts"]) for pair in pairs)], rows, note)


def bands(facts: Facts) -> list[str]:
    """Return the headers of the bands: t 0 to 249 …"""
    return [f"t {low} to {high}" for low, high in facts["timesteps"]]


def share(found: Mapping[str, float], places: int = 1, signed: bool = False) -> str:
    """Return a share as text: 12.3 % [10.1, 14.0]."""
    value, low, high = (number(100 * found[name], places, signed) for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"
