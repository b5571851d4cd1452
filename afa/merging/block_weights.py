"""The block-weighted merge (MBW): its rule, the community's presets, and how weights are written.

Names and shapes of presets as in bbc-mc's sdweb-merge-block-weighted-gui and hako-mikan's
sd-webui-supermerger. All leave `base` at 0. They are functions of the stage's place k = 0 (IN00) … 12 (M00) …
24 (OUT11) of SD 1.x. SDXL's stages get what SD 1.x' stages of the same name get, as in supermerger: IN09 …
IN11 and OUT09 … OUT11 are left out. For other numbers of stages the IN and OUT halves are stretched or
shrunk; M00 stays M00.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from afa.errors import UserError, unknown
from afa.merging.rules import BASE, ORDERS, Merge, Option, Options, weighted
from afa.schema import Within, build
from afa.settings import shares
from afa.text_files import read_toml

if TYPE_CHECKING:
    from torch import Tensor

OTHERS = "others"  # in a TOML file: what stages get that it does not name
Named = Mapping[str, float | Sequence[float]]
Given = Named | Sequence[float] | Sequence[str] | str


def mbw(tensors: "Sequence[Tensor]", *, stage: str, weights: Mapping[str, Sequence[float]]) -> "Tensor":
    """Block-weighted mean: weighted, with one set of weights per stage.

    weights: stage -> one per expert, for every stage and for `base` (all that is not the denoiser).
    Source: bbc-mc, sdweb-merge-block-weighted-gui. Deviation: more than two experts, each stage its own
    convex weights.
    """
    return weighted(tensors, weights=weights[stage])


# ---- presets: the second expert's share along the stages --------------------------------------------------

MIDDLE, LAST = 12, 24
SDXL = 9  # stages of each half


def _steps(*edges: tuple[int, float]) -> Callable[[int], float]:
    """A value from each place on: (0, a), (4, b) …"""
    return lambda place: next(value for start, value in reversed(edges) if place >= start)


def _listed(*values: float) -> Callable[[int], float]:
    return lambda place: values[place]


def _smoothstep(x: float) -> float:
    """3x² - 2x³, from 0 to 1."""
    return x * x * (3 - 2 * x)


PRESETS: dict[str, Callable[[int], float]] = {
    "GRAD_V": lambda place: abs(place - MIDDLE) / MIDDLE,
    "GRAD_A": lambda place: 1 - abs(place - MIDDLE) / MIDDLE,
    "FLAT_25": lambda place: 0.25,
    "FLAT_50": lambda place: 0.5,
    "FLAT_75": lambda place: 0.75,
    "WRAP08": _steps((0, 1), (4, 0), (21, 1)),
    "WRAP12": _steps((0, 1), (6, 0), (19, 1)),
    "WRAP14": _steps((0, 1), (7, 0), (18, 1)),
    "WRAP16": _steps((0, 1), (8, 0), (17, 1)),
    "MID12_50": _steps((0, 0), (5, 0.5), (19, 0)),
    "OUT07": _steps((0, 0), (18, 1)),
    "OUT12": _steps((0, 0), (13, 1)),
    "OUT12_5": _steps((0, 0), (12, 0.5), (13, 1)),
    "RING08_SOFT": _listed(*[0] * 5, 0.5, 1, 1, 1, 0.5, *[0] * 5, 0.5, 1, 1, 1, 0.5, *[0] * 5),
    "RING08_5": _steps((0, 0), (6, 1), (10, 0), (15, 1), (19, 0)),
    "RING10_5": _steps((0, 0), (5, 1), (10, 0), (15, 1), (20, 0)),
    "RING10_3": _steps((0, 0), (6, 1), (11, 0), (14, 1), (19, 0)),
    "SMOOTHSTEP": lambda place: _smoothstep(place / LAST),
    "REVERSE_SMOOTHSTEP": lambda place: 1 - _smoothstep(place / LAST),
    "ALL_A": lambda place: 0.0,
    "ALL_B": lambda place: 1.0,
}


def has_presets(stages: Sequence[str]) -> bool:
    """Whether presets are for a model of these stages: it must be a U-Net."""
    return any(stage.startswith("IN") for stage in stages)


def preset_weights(name: str, stages: tuple[str, ...]) -> dict[str, float]:
    """A preset's share of the second expert for every stage IN00 …, M00, OUT00 … of a U-Net."""
    places = dict.fromkeys(stages, float(MIDDLE))
    for side, start in (("IN", 0), ("OUT", MIDDLE + 1)):
        half = [stage for stage in stages if stage.startswith(side)]
        steps = MIDDLE - 1 if len(half) == SDXL else max(len(half) - 1, 1)
        places |= {stage: start + index * (MIDDLE - 1) / steps for index, stage in enumerate(half)}
    return {stage: _between(PRESETS[name], place) for stage, place in places.items()}


def _between(curve: Callable[[int], float], place: float) -> float:
    """A curve's value, between two whole places on the straight line."""
    low = min(int(place), LAST - 1)
    return curve(low) + (place - low) * (curve(low + 1) - curve(low)) if place > low else curve(low)


# ---- weights as they were written -------------------------------------------------------------------------


def stage_weights(
    given: Given, stages: Sequence[str], experts: int, base_alpha: float | None = None
) -> dict[str, tuple[float, ...]]:
    """One weight per expert, summing to 1, for `base` and for every stage.

    given: a mapping stage -> share of the second of two experts, or stage -> a weight for each expert
    (`others` is for the stages it does not name); or the numbers of all stages in order, with or without
    `base` in front; or a preset's name, a string of numbers, a TOML file; or a list of such strings, one per
    expert.
    base_alpha: the second of two experts' share of `base`, if `given` has none; None: 0
    Raises UserError for unknown stages, wrong numbers of weights, and what is no share.
    """
    stages = tuple(stages)
    listed = isinstance(given, Sequence) and all(isinstance(one, str) for one in given)
    texts = [given] if isinstance(given, str) else list(given) if listed else []
    if len(texts) > 1 and len(texts) != experts:
        advice = "give one for each, or the second's alone if there are two"
        raise UserError(f"{len(texts)} sets of block weights for {experts} experts; {advice}")
    if len(texts) > 1:
        rows = _side_by_side([_by_stage(text, stages) for text in texts], stages)
    else:
        named = _by_stage(texts[0] if texts else given, stages)
        rows = {stage: _row(stage, value, experts) for stage, value in named.items()}
    if base_alpha is not None and BASE in rows:
        said = " ".join(f"{one:g}" for one in rows[BASE])
        raise UserError(f"the block weights name {BASE} ({said}); leave out base_alpha {base_alpha:g}")
    if base_alpha is not None and (experts != 2 or not 0 <= base_alpha <= 1):
        meaning = f"the share of the second of two experts, from 0 to 1; here are {experts}"
        raise UserError(f"base_alpha {base_alpha:g} is {meaning}")
    share = base_alpha or 0.0
    return {BASE: (1 - share, share, *[0.0] * (experts - 2))} | rows


def _by_stage(given: object, stages: tuple[str, ...]) -> dict[str, float | Sequence[float]]:
    """What was given, by stage, with `others` for the stages that it does not name; `base` may be missing."""
    if isinstance(given, str):
        given = _read(given, stages)
    if not isinstance(given, Mapping):
        numbers = [float(one) for one in given]  # type: ignore[attr-defined]
        if len(numbers) not in (len(stages), len(stages) + 1):
            with_base = f"{len(stages) + 1} ({BASE} in front of them)"
            expected = f"{len(stages)} ({stages[0]} … {stages[-1]}) or {with_base}"
            raise UserError(f"{len(numbers)} block weights, expected {expected} for this model")
        given = dict(zip((BASE, *stages)[-len(numbers) :], numbers, strict=True))
    for name in given:
        if name not in (BASE, OTHERS, *stages):
            raise UserError(unknown(name, (BASE, *stages, OTHERS), "stage"))
    lacking = [stage for stage in stages if stage not in given]
    if lacking and OTHERS not in given:
        advice = f"name every stage, or say '{OTHERS} = 0.5' for the rest"
        raise UserError(f"there is no weight for {', '.join(lacking)}; {advice}")
    named = BASE in given or OTHERS in given
    return {stage: given.get(stage, given.get(OTHERS, 0)) for stage in ((BASE, *stages) if named else stages)}


def _read(text: str, stages: tuple[str, ...]) -> Named | list[float]:
    """A preset, numbers, or a TOML file: IN00 = 0.5, or IN00 = [0.2, 0.3, 0.5] for three experts."""
    if text in PRESETS:
        if not has_presets(stages):
            advice = "for this model give numbers or a TOML file"
            raise UserError(f"preset {text} is for the stages of a U-Net; {advice}")
        return preset_weights(text, stages)
    if text.endswith(".toml"):
        try:
            found = read_toml(Path(text))
        except OSError as error:
            raise UserError(f"{text} cannot be read as a TOML file of block weights: {error}") from None
        weights: Named = build(dict[str, float | Annotated[list[float], Within(1)]], found, text)
        return weights
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        kinds = "numbers with commas between them, a .toml file or a preset"
        raise UserError(
            f"'{text}' are no block weights ({kinds}): {unknown(text, PRESETS, 'preset')}"
        ) from None


def _row(stage: str, value: float | Sequence[float], experts: int) -> tuple[float, ...]:
    """The weights of all experts at a stage, from these or from the share of the second of two."""
    if isinstance(value, Sequence):
        return shares(value, experts, stage)
    if experts != 2:
        meaning = f"a share of the second of two experts; for {experts}, give a weight for each"
        raise UserError(f"{stage} = {value:g} is {meaning}")
    if not 0 <= value <= 1:
        raise UserError(f"{stage} = {value:g} is no share of the second expert; give a number from 0 to 1")
    return (1 - value, value)


def _side_by_side(
    columns: Sequence[Mapping[str, float | Sequence[float]]], stages: tuple[str, ...]
) -> dict[str, tuple[float, ...]]:
    """One set of numbers per expert; one that does not name `base` has no part in it."""
    rows = {}
    for stage in (BASE, *stages) if any(BASE in column for column in columns) else stages:
        values = [column.get(stage, 0.0) for column in columns]
        if any(isinstance(value, Sequence) for value in values):
            advice = "give that file alone, or a number for each stage"
            raise UserError(f"{stage} has a list of weights in a set that is one expert's; {advice}")
        rows[stage] = shares(values, len(columns), stage)  # type: ignore[arg-type]
    return rows


# ---- what stands in the registry --------------------------------------------------------------------------

SHAPES = ("GRAD_V", "GRAD_A", "WRAP12", "SMOOTHSTEP", "OUT12", "MID12_50")  # presets worth trying
RAMPS = ((0.0, 1.0), (0.25, 0.75))  # the second's share at the first and at the last stage, without presets


def _curves(count: int, stages: Sequence[str]) -> list[Options]:
    """Candidates of a comparison, each in both directions: presets for U-Nets, else straight lines."""
    presets: list[Options] = [{"preset": name} for name in SHAPES]
    ramps: list[Options] = [{"first": first, "last": last} for first, last in RAMPS]
    curves = presets if has_presets(stages) else ramps
    return [{**curve, "order": order} for curve in curves for order in ORDERS]


def curve_weights(
    curve: Mapping[str, Any], stages: tuple[str, ...], experts: Sequence[str], pair: Sequence[str]
) -> dict[str, list[float]]:
    """A candidate of a comparison as the weights of all experts, from the first of a pair to the second.

    curve: a preset, or the second's share at the first and at the last stage; `base` is half and half
    pair:  the names of two of the experts
    """
    named = preset_weights(curve["preset"], stages) if "preset" in curve else ramp(stages, **curve)
    return {
        stage: [share * (name == pair[1]) + (1 - share) * (name == pair[0]) for name in experts]
        for stage, share in {BASE: 0.5, **named}.items()
    }


def ramp(stages: Sequence[str], first: float, last: float) -> dict[str, float]:
    """A straight line along the stages, from a share at the first to one at the last."""
    steps = max(1, len(stages) - 1)
    return {stage: first + (last - first) * place / steps for place, stage in enumerate(stages)}


def _complete(
    count: int,
    stages: Sequence[str],
    *,
    weights: Annotated[Any, Option("shares of the second expert, or weights of all, for every stage")],
    base_alpha: Annotated[
        float | None,
        Option(
            "share of the second of two experts of everything except the denoiser, if the weights do not"
            " name `base` (default: 0)"
        ),
    ] = None,
) -> Options:
    return {"weights": stage_weights(weights, stages, count, base_alpha)}


MBW = Merge(
    mbw,
    title="MBW",
    help="weighted, with weights of its own for every stage (block-weighted merge)",
    row="one model, weights averaged stage by stage along the community's presets",
    candidates=_curves,
    fill=_complete,
    by_stage=True,
)
