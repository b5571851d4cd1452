"""What a screening found as tables, the same for the terminal and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from afa.evaluation.statistics import Estimate
from afa.pages.numbers import number
from afa.pages.tables import Row, Shown, Table

Facts = Mapping[str, Any]


def loss_table(facts: Facts) -> Table:
    """Every expert's loss, by band."""
    headers = ["expert", "all timesteps", *bands(facts), "wins"]
    rows = []
    for name, found in facts["losses"].items():
        shown = [Shown(Estimate(**one)) for one in (found["overall"], *found["bands"])]
        rows.append(Row([name, *shown, Shown(Estimate(**found["wins"]), share=True)], "", name == facts["best"]))
    note = "Mean squared error of the prediction. wins: the share of all elements (channel and place) at which this expert's error is the least."
    return Table(headers, rows, note)


def room_table(facts: Facts) -> Table:
    """Head-room and what else the same experts could do, by band."""
    rows = [("routed by place: head-room", facts["head_room"]), *facts["bounds"].items()]
    made = [Row([name, *(share(one) for one in (found["overall"], *found["bands"]))], "", place == 0) for place, (name, found) in enumerate(rows)]
    if isinstance(facts["average"], Mapping):
        made.append(Row(["weight average", *(share(one) for one in (facts["average"]["overall"], *facts["average"]["bands"]))]))
    agreement = [f"{share(one['observed'])}; chance {number(100 * one['chance'], 1)}" for one in facts["agreement"]]
    made.append(Row(["winners of two noises agree", None, *agreement]))
    note = (
        f"How much lower than the loss of {facts['best']}, the best expert of all timesteps (n = {facts['images']} images). Routed: at each place"
        f" the expert answers that won most often on the other noises (of {facts['draws']}); what only the noise decides cannot be learnt and is"
        " not in it. Oracles use the truth: upper bounds."
    )
    return Table(["answered by", "all timesteps", *bands(facts)], made, note)


def parts_table(facts: Facts) -> Table:
    """What the set would lose without an expert."""
    rows = [Row([name, share(found, signed=True)]) for name, found in facts["leave_one_out"].items()]
    return Table(["without", "routed loss"], rows, f"Change of the routed loss, n = {facts['images']} images; an interval around 0: the expert adds nothing.")


def subset_table(facts: Facts) -> Table:
    """The best set of every size."""
    rows = [Row([str(one["size"]), ", ".join(one["experts"]), share(one["head_room"])]) for one in facts["subsets"]]
    return Table(["experts", "the best of that many", "head-room"], rows, f"Over the best single expert, n = {facts['images']} images.")


def foretold_table(facts: Facts) -> Table:
    """What training would gain."""
    titles = {"over_best": f"the best expert ({facts['best']})", "over_router": "a router on the predictions", "over_average": "the weight average"}
    rows = [Row([titles[name], foretold(found)]) for name, found in facts["predicted"].items() if found is not None]
    sets = facts["predicted"]["over_best"]["sets"]
    note = (
        f"Loss of AFA below that of others, foretold from head-room by what {sets} expert sets of the embedded world gained in training;"
        " the interval held 95 % of them. For large models a guess; measure it."
    )
    return Table(["AFA over", "loss lower by"], rows, note)


def weights_table(facts: Facts) -> Table:
    """Distances between parameters."""
    found = facts["parameters"]
    based = found["base"] is not None
    headers = ["experts", "distance", "most at", *(["changes alike"] if based else [])]
    rows = []
    for pair in found["pairs"]:
        most = max(pair["stages"], key=pair["stages"].get)
        alike = [None if pair["cosine_of_changes"] is None else number(pair["cosine_of_changes"], 3)] if based else []
        rows.append(Row([" and ".join(pair["experts"]), _plain(pair["distance"]), f"{most}: {_plain(pair['stages'][most])}", *alike]))
    for name, base in (found["base"] or {}).items():
        rows.append(Row([f"{name} and the base", _plain(base["distance"]), f"cosine {base['cosine']:.6f}", *[None]]))
    note = "Of the denoisers' weights, relative to their size; 0: the same. changes alike: cosine between what both changed about the base."
    return Table(headers, rows, note if based else note.partition(" changes")[0])


def apart_table(facts: Facts) -> Table:
    """Distances between predictions."""
    rows = [Row([" and ".join(pair["experts"]), *(number(value, 3) for value in pair["bands"])]) for pair in facts["predictions"]]
    note = (
        f"Root mean square of their difference, relative to their errors, over {facts['images']} images;"
        " 0: the same, 1.41: errors that have nothing in common."
    )
    return Table(["predictions of", *bands(facts)], rows, note)


def feature_table(facts: Facts) -> Table:
    """Distances between features, stage by stage."""
    pairs = facts["features"]
    rows = [Row([stage, *(number(pair["stages"][stage], 3) for pair in pairs)]) for stage in pairs[0]["stages"]]
    note = "Each expert on its own path; 0: the same features, 1.41: nothing in common."
    return Table(["stage", *(" and ".join(pair["experts"]) for pair in pairs)], rows, note)


def bands(facts: Facts) -> list[str]:
    """Headers: t 0 to 249 …"""
    return [f"t {low} to {high}" for low, high in facts["timesteps"]]


def share(found: Mapping[str, float], signed: bool = False) -> str:
    """12.3 % [10.1, 14.0]"""
    value, low, high = (number(100 * found[name], 1, signed) for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def foretold(found: Mapping[str, float]) -> str:
    value, low, high = (number(100 * found[name], 0) for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def _plain(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def all_tables(facts: Facts) -> Sequence[tuple[str, str, Table]]:
    """A short name, a title, the table; those that were not found are left out."""
    judged = facts.get("losses") is not None
    found: list[tuple[str, str, Table]] = []
    if judged:
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
