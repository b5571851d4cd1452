"""The content of screen.json; numbers over images have an interval and n."""

from dataclasses import asdict
from typing import Any

import numpy as np

from afa.pages.advice import UNKNOWN
from afa.places import public_place
from afa.screening.comparison import ExpertComparison
from afa.screening.distances import SAME, Distances, stage_pairs
from afa.screening.plan import ScreenPlan
from afa.screening.predict import AnswerStore
from afa.screening.verdict import WORTH, Evidence, Forecast, Verdict, forecast, judge, over
from afa.stats import Estimate, difference, estimate
from afa.version import __version__

NEAR = 0.1  # of their errors: predictions that are less apart are nearly the same
UNKNOWABLE = (
    "Which expert is right, what each adds, whether routing or merging gains anything:"
    " for that captioned images are needed (--data). "
    "Known without them: which experts are the same, and where they disagree."
)


def facts_of(
    planned: ScreenPlan,
    comparison: ExpertComparison,
    apart: Distances | str,
    average: AnswerStore | str,
    steps: int,
) -> dict[str, Any]:
    """Return everything that a screening found, ready for JSON.

    apart:   distances between weights, or the reason why there are none
    average: answers of the weight average, or the reason why there are none
    steps:   number of timesteps of the noise schedule
    """
    settings, names, bands = planned.settings, comparison.names, comparison.bands
    common = {
        "afa": __version__,
        "experts": [{"name": spec.name, "source": public_place(str(spec))} for spec in planned.specs],
        "data": public_place(settings.data),
        "prompts": public_place(settings.prompts),
        "images": comparison.images,
        "draws": settings.draws,
        "resolution": planned.resolution,
        "timesteps": [[band * steps // bands, (band + 1) * steps // bands - 1] for band in range(bands)],
        "only_predictions": planned.apart,
        "parameters": apart if isinstance(apart, str) else apart.facts(),
        "predictions": [
            {"experts": [names[one], names[other]], "bands": comparison.apart(one, other)}
            for one, other in comparison.pairs
        ],
        "features": stage_pairs(names, [store.features() for store in comparison.stores]),
    }
    if settings.data is None:
        return common | {"unknown": UNKNOWABLE, "verdict": _only_disagreement(comparison, apart)}
    return common | _judged(comparison, apart, average)


def _judged(
    comparison: ExpertComparison, apart: Distances | str, average: AnswerStore | str
) -> dict[str, Any]:
    """Return what can be computed only with captioned images."""
    all_experts = comparison.routed(range(len(comparison.names)))
    room, by_band = comparison.gains(all_experts)
    lost = leave_one_out(comparison)
    averaged = None
    if not isinstance(average, str):
        averaged = comparison.gains(ExpertComparison(("average",), [average]).losses[0])
    average_gain = None if averaged is None else averaged[0]
    afa, router = (forecast(method, room.value, average_gain) for method in ("afa", "router"))
    over_average = None if average_gain is None else asdict(over(afa, average_gain.value))
    evidence = _evidence(comparison, apart, lost, room, afa, average_gain)
    return {
        "best": comparison.best,
        "losses": _losses(comparison),
        "head_room": _gains((room, by_band)),
        "bounds": _bounds(comparison),
        "agreement": [
            {"observed": asdict(observed), "chance": chance} for observed, chance in comparison.agreement()
        ],
        "leave_one_out": {name: asdict(value) for name, value in lost.items()},
        "subsets": _subsets(comparison),
        "average": average if averaged is None else _gains(averaged),
        "predicted": {
            "over_best": asdict(afa),
            "over_router": asdict(over(afa, router.value)),
            "over_average": over_average,
        },
        "verdict": _plain(judge(evidence)),
    }


def _evidence(
    comparison: ExpertComparison,
    apart: Distances | str,
    lost: dict[str, Estimate],
    room: Estimate,
    afa: Forecast,
    average: Estimate | None,
) -> Evidence:
    """Return what the verdict rests on; the arguments are fields of Evidence."""
    path = comparison.greedy()
    losses = [comparison.routed(members).mean() for members in path]
    enough = next(size for size, loss in enumerate(losses, 1) if loss <= min(losses) * (1 + WORTH))
    return Evidence(
        names=comparison.names,
        best=comparison.best,
        same=_same(comparison, apart),
        base=_bases(comparison, apart),
        lost=lost,
        room=room,
        afa=afa,
        average=average,
        order=[comparison.names[place] for place in path[-1]],
        enough=enough,
        near=_near(comparison),
    )


def _losses(comparison: ExpertComparison) -> dict[str, Any]:
    """Return for each expert the loss over all bands and in each band, and the share of elements it wins."""
    wins = comparison.wins().mean(2)  # (N, M)
    found = {}
    for place, name in enumerate(comparison.names):
        losses = comparison.losses[place]
        found[name] = {
            "overall": asdict(estimate(losses.mean(1))),
            "bands": [asdict(estimate(losses[:, band])) for band in range(comparison.bands)],
            "wins": asdict(estimate(wins[place])),
        }
    return found


def _bounds(comparison: ExpertComparison) -> dict[str, Any]:
    """Return the gains over the best expert of other ways to combine or choose predictions."""
    by_time = comparison.losses.mean(1).argmin(0)  # the best of each band
    timesteps = np.stack([comparison.losses[place, :, band] for band, place in enumerate(by_time)], axis=1)
    rows = {
        "routed by element": comparison.values("routed"),
        "best expert of each band": timesteps,
        "mean of predictions": comparison.values("mean"),
        "oracle, by sample": comparison.values("sample_oracle"),
        "oracle, by element": comparison.values("element_oracle"),
    }
    return {name: _gains(comparison.gains(losses)) for name, losses in rows.items()}


def _gains(found: tuple[Estimate, list[Estimate]]) -> dict[str, Any]:
    return {"overall": asdict(found[0]), "bands": [asdict(one) for one in found[1]]}


def leave_one_out(comparison: ExpertComparison) -> dict[str, Estimate]:
    """Return the rise of the routed loss without each expert, as a share of the loss with all experts."""
    places, found = range(len(comparison.names)), {}
    whole = comparison.routed(places).mean(1)
    for left_out, name in enumerate(comparison.names):
        without = comparison.routed([place for place in places if place != left_out]).mean(1)
        rise, loss = difference(without, whole), whole.mean()
        found[name] = Estimate(rise.value / loss, rise.low / loss, rise.high / loss, rise.n)
    return found


def _subsets(comparison: ExpertComparison) -> list[dict[str, Any]]:
    """Return the best set of every size."""
    found = []
    for size in range(1, len(comparison.names) + 1):
        members = comparison.best_of_size(size)
        names = [comparison.names[place] for place in sorted(members)]
        overall, _ = comparison.gains(comparison.routed(members))
        found.append({"size": size, "experts": names, "head_room": asdict(overall)})
    return found


def _same(comparison: ExpertComparison, apart: Distances | str) -> dict[str, str]:
    """Return later expert -> earlier expert with the same weights (predictions if there are no weights)."""
    found: dict[str, str] = {}
    for one, other in sorted(comparison.pairs, key=lambda pair: pair[1]):
        distance = max(comparison.apart(one, other)) if isinstance(apart, str) else apart.between(one, other)
        if distance < SAME and comparison.names[one] not in found:
            found.setdefault(comparison.names[other], comparison.names[one])
    return found


def _near(comparison: ExpertComparison) -> dict[str, tuple[str, float]]:
    """Return later expert -> earlier expert with predictions closer than NEAR in all bands, and distance."""
    found: dict[str, tuple[str, float]] = {}
    for one, other in sorted(comparison.pairs, key=lambda pair: pair[1]):
        distance = max(comparison.apart(one, other))
        if distance < NEAR:
            found.setdefault(comparison.names[other], (comparison.names[one], distance))
    return found


def _bases(comparison: ExpertComparison, apart: Distances | str) -> list[str]:
    if isinstance(apart, str) or not apart.based:
        return []
    return [name for place, name in enumerate(comparison.names) if apart.from_base(place) < SAME]


def _only_disagreement(comparison: ExpertComparison, apart: Distances | str) -> dict[str, Any]:
    dropped = {name: f"it is {other} but for rounding" for name, other in _same(comparison, apart).items()}
    dropped |= dict.fromkeys(_bases(comparison, apart), "it is the base model under another name")
    kept = tuple(name for name in comparison.names if name not in dropped)
    return _plain(Verdict(UNKNOWN, kept, dropped, (UNKNOWABLE,)))


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {"headline": verdict.headline} | asdict(verdict)
