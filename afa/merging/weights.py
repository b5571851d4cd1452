"""Block weights: the community's presets, and weights from however they were written to one convex set per
stage.

Names and shapes of presets as in bbc-mc's sdweb-merge-block-weighted-gui and hako-mikan's
sd-webui-supermerger. All leave `base` at 0. They are functions of the stage's place k = 0 (IN00) … 12 (M00) …
24 (OUT11) of SD 1.x. SDXL's stages get what SD 1.x' stages of the same name get, as in supermerger: IN09 …
IN11 and OUT09 … OUT11 are left out. For other numbers of stages the IN and OUT halves are stretched or
shrunk; M00 stays M00.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from afa.errors import UserError, unknown
from afa.merging.keys import BASE
from afa.schema import Within, build
from afa.settings import shares
from afa.text_files import read_toml as read_toml_file

OTHERS = "others"  # in a TOML file: what stages get that it does not name
Named = Mapping[str, float | Sequence[float]]
Given = Named | Sequence[float] | Sequence[str] | str

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
    curve = PRESETS[name]
    inward = [stage for stage in stages if stage.startswith("IN")]
    outward = [stage for stage in stages if stage.startswith("OUT")]
    places = {stage: _stretched(index, len(inward), 0) for index, stage in enumerate(inward)}
    places |= {stage: _stretched(index, len(outward), MIDDLE + 1) for index, stage in enumerate(outward)}
    return {stage: _between(curve, places.get(stage, float(MIDDLE))) for stage in stages}


def _stretched(index: int, count: int, start: int) -> float:
    """The place of one of `count` stages among the 12 of a half that begins at `start`."""
    if count == SDXL:
        return start + index
    return start + (index * (MIDDLE - 1) / (count - 1) if count > 1 else 0)


def _between(curve: Callable[[int], float], place: float) -> float:
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
    base_alpha: the second of two experts' share of `base`, where the weights do not say it. What nobody says
    of `base` is the first expert's. Raises UserError for unknown stages, wrong numbers of weights, and what
    is no share.
    """
    stages = tuple(stages)
    texts = [given] if isinstance(given, str) else list(given) if _all(given, str) else []
    if len(texts) > 1 and len(texts) == experts:
        rows = _side_by_side([_named(text, stages) for text in texts], stages)
    elif len(texts) > 1:
        raise UserError(
            f"{len(texts)} sets of block weights for {experts} experts; give one for each, or the second's"
            " alone if there are two"
        )
    else:
        rows = _rows(_named(texts[0] if texts else given, stages), stages, experts)
    return _with_base(rows, experts, base_alpha)


def _all(given: object, kind: type) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(one, kind) for one in given)


def _named(given: object, stages: tuple[str, ...]) -> dict[str, float | Sequence[float]]:
    """What was given, by stage, with `others` spread over the stages that are not named; `base` may be
    missing."""
    if isinstance(given, str):
        given = _read(given, stages)
    if not isinstance(given, Mapping):
        given = _in_order([float(one) for one in given], stages)  # type: ignore[attr-defined]
    for name in given:
        if name not in (BASE, OTHERS, *stages):
            raise UserError(unknown(name, (BASE, *stages, OTHERS), "stage"))
    lacking = [stage for stage in stages if stage not in given]
    if lacking and OTHERS not in given:
        raise UserError(
            f"there is no weight for {', '.join(lacking)}; name every stage, or say '{OTHERS} = 0.5' for the"
            " rest"
        )
    named = BASE in given or OTHERS in given
    return {stage: given.get(stage, given.get(OTHERS, 0)) for stage in ((BASE, *stages) if named else stages)}


def _read(text: str, stages: tuple[str, ...]) -> Named | list[float]:
    """A preset, a TOML file, or numbers."""
    if text in PRESETS:
        if not has_presets(stages):
            raise UserError(
                f"preset {text} is for the stages of a U-Net; for this model give numbers or a TOML file"
            )
        return preset_weights(text, stages)
    if text.endswith(".toml"):
        return read_toml(Path(text))
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        kinds = "numbers with commas between them, a .toml file or a preset"
        raise UserError(
            f"'{text}' are no block weights ({kinds}): {unknown(text, PRESETS, 'preset')}"
        ) from None


def read_toml(path: Path) -> dict[str, float | list[float]]:
    """Weights by stage, e.g. IN00 = 0.5, or IN00 = [0.2, 0.3, 0.5] for three experts.

    Raises UserError if it cannot be read.
    """
    try:
        found = read_toml_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a TOML file of block weights: {error}") from None
    weights: dict[str, float | list[float]] = build(
        dict[str, float | Annotated[list[float], Within(1)]], found, path
    )
    return weights


def _in_order(numbers: list[float], stages: tuple[str, ...]) -> dict[str, float]:
    """Numbers without names: of all stages in order, `base` in front or not."""
    if len(numbers) not in (len(stages), len(stages) + 1):
        expected = (
            f"{len(stages)} ({stages[0]} … {stages[-1]}) or {len(stages) + 1} ({BASE} in front of them)"
        )
        raise UserError(f"{len(numbers)} block weights, expected {expected} for this model")
    return dict(zip((BASE, *stages)[-len(numbers) :], numbers, strict=True))


def _rows(
    named: Mapping[str, float | Sequence[float]], stages: tuple[str, ...], experts: int
) -> dict[str, tuple[float, ...]]:
    """One set of weights for all: a share of the second of two experts, or a list."""
    rows = {}
    for stage, value in named.items():
        if isinstance(value, Sequence):
            rows[stage] = shares(value, experts, stage)
        elif experts != 2:
            raise UserError(
                f"{stage} = {value:g} is a share of the second of two experts; for {experts}, give a weight"
                " for each"
            )
        elif not 0 <= value <= 1:
            raise UserError(
                f"{stage} = {value:g} is no share of the second expert; give a number from 0 to 1"
            )
        else:
            rows[stage] = (1 - value, value)
    return rows


def _side_by_side(
    columns: Sequence[Mapping[str, float | Sequence[float]]], stages: tuple[str, ...]
) -> dict[str, tuple[float, ...]]:
    """One set of numbers per expert; one that does not name `base` has no part in it."""
    rows = {}
    for stage in (BASE, *stages) if any(BASE in column for column in columns) else stages:
        values = [column.get(stage, 0.0) for column in columns]
        if any(isinstance(value, Sequence) for value in values):
            raise UserError(
                f"{stage} has a list of weights in a set that is one expert's; give that file alone, or a"
                " number for each stage"
            )
        rows[stage] = shares(values, len(columns), stage)  # type: ignore[arg-type]
    return rows


def _with_base(
    rows: dict[str, tuple[float, ...]], experts: int, base_alpha: float | None
) -> dict[str, tuple[float, ...]]:
    if base_alpha is not None and BASE in rows:
        raise UserError(
            f"the block weights name {BASE} ({' '.join(f'{one:g}' for one in rows[BASE])}); leave out"
            f" base_alpha {base_alpha:g}"
        )
    if base_alpha is not None and (experts != 2 or not 0 <= base_alpha <= 1):
        raise UserError(
            f"base_alpha {base_alpha:g} is the share of the second of two experts, from 0 to 1; here are"
            f" {experts}"
        )
    share = base_alpha or 0.0
    return {
        BASE: rows.get(BASE, (1 - share, share, *[0.0] * (experts - 2))),
        **{stage: row for stage, row in rows.items() if stage != BASE},
    }
