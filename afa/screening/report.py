"""What a screening found: its tables, as text for the terminal and as a page, and the files of both."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.files import write_atomically
from afa.pages import charts
from afa.pages.numbers import number
from afa.pages.page import render
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
CROWDED = 14  # stages, above which not every name is written


def write(facts: Facts, output: str) -> None:
    """screen.json and report.html, each whole."""
    folder = Path(output)
    write_atomically(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / PAGE, as_html(facts))


def as_html(facts: Facts) -> str:
    """The page."""
    given = f"captioned images of {facts['data']}"
    drawn = f"prompts of {facts['prompts']}, drawn by the experts"
    timesteps, draws, pixels = len(facts["timesteps"]), facts["draws"], facts["resolution"]
    probes = f"{timesteps} timesteps an image, {draws} noises each, {pixels} pixels"
    return render(
        "screening.html",
        heading=f"Screening of {', '.join(expert['name'] for expert in facts['experts'])}",
        asked=f"{facts['images']} {given if facts['data'] else drawn}; {probes}.",
        verdict=facts["verdict"],
        dropped=[(f"without {name}", why) for name, why in facts["verdict"]["dropped"].items()],
        sections=[(name, title, chart(name, facts), table) for name, title, table in all_tables(facts)],
        notes=notes(facts),
        afa=facts["afa"],
    )


def as_text(facts: Facts) -> str:
    """For the terminal: the verdict and its reasons first, then the tables they rest on."""
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
    """What could not be found out, and why."""
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
    """A curve a pair of experts, over the stages.

    "" for other tables, and for more pairs than can be told apart.
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
    every = -(-len(stages) // CROWDED)
    words = {place: stage for place, stage in enumerate(stages) if place % every == 0}
    what = f"distance of {name}"
    described = f"{what} by stage for {', '.join(curve.name for curve in curves)}"
    return charts.curves(curves, words, "stage", what, described, field=charts.LOW, zero=True)


def all_tables(facts: Facts) -> Sequence[tuple[str, str, Table]]:
    """A short name, a title, the table; those that were not found are left out."""
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
    """Every expert's loss, by band."""
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
    """Head-room and what else the same experts could do, by band."""
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
        f"How much lower than the loss of {facts['best']}, the best expert of all timesteps (n ="
        f" {facts['images']} images). Routed: at each place the expert answers that won most often on the"
        f" other noises (of {facts['draws']}); what only the noise decides cannot be learnt and is not in it."
        " Oracles use the truth: upper bounds."
    )
    return Table(["answered by", "all timesteps", *bands(facts)], rows, note)


def parts_table(facts: Facts) -> Table:
    """What the set would lose without an expert."""
    rows = [TableRow([name, share(found, signed=True)]) for name, found in facts["leave_one_out"].items()]
    adds = "an interval around 0: the expert adds nothing"
    return Table(
        ["without", "routed loss"], rows, f"Change of the routed loss, n = {facts['images']} images; {adds}."
    )


def subset_table(facts: Facts) -> Table:
    """The best set of every size."""
    rows = [
        TableRow([str(one["size"]), ", ".join(one["experts"]), share(one["head_room"])])
        for one in facts["subsets"]
    ]
    note = f"Over the best single expert, n = {facts['images']} images."
    return Table(["experts", "the best of that many", "head-room"], rows, note)


def foretold_table(facts: Facts) -> Table:
    """What training would gain."""
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
        f"Loss of AFA below that of others, foretold from head-room by what {sets} expert sets of the"
        " embedded world gained in training; the interval held 95 % of them. For large models a guess;"
        " measure it."
    )
    return Table(["AFA over", "loss lower by"], rows, note)


def weights_table(facts: Facts) -> Table:
    """Distances between parameters."""
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
    note = "Of the denoisers' weights, relative to their size; 0: the same."
    alike = " changes alike: cosine between what both changed about the base."
    return Table(headers, rows, note + alike if based else note)


def _plain(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def apart_table(facts: Facts) -> Table:
    """Distances between predictions."""
    pairs = facts["predictions"]
    rows = [
        TableRow([" and ".join(pair["experts"]), *(number(value, 3) for value in pair["bands"])])
        for pair in pairs
    ]
    note = (
        f"Root mean square of their difference, relative to their errors, over {facts['images']} images;"
        " 0: the same, 1.41: errors that have nothing in common."
    )
    return Table(["predictions of", *bands(facts)], rows, note)


def feature_table(facts: Facts) -> Table:
    """Distances between features, stage by stage."""
    pairs = facts["features"]
    rows = [
        TableRow([stage, *(number(pair["stages"][stage], 3) for pair in pairs)])
        for stage in pairs[0]["stages"]
    ]
    note = "Each expert on its own path; 0: the same features, 1.41: nothing in common."
    return Table(["stage", *(" and ".join(pair["experts"]) for pair in pairs)], rows, note)


def bands(facts: Facts) -> list[str]:
    """Headers: t 0 to 249 …"""
    return [f"t {low} to {high}" for low, high in facts["timesteps"]]


def share(found: Mapping[str, float], places: int = 1, signed: bool = False) -> str:
    """12.3 % [10.1, 14.0]"""
    value, low, high = (number(100 * found[name], places, signed) for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"
