"""The community's presets of block weights: the share of the second expert along the 25 stages of SD 1.x.

Names and shapes as in bbc-mc's sdweb-merge-block-weighted-gui and hako-mikan's sd-webui-supermerger. All leave `base`
at 0. They are written as functions of the stage's place k = 0 (IN00) … 12 (M00) … 24 (OUT11). SDXL's stages get what SD 1.x'
stages of the same name get, as in supermerger: IN09 … IN11 and OUT09 … OUT11 are left out. For other numbers of stages the
IN and OUT halves are stretched or shrunk; M00 stays M00.
"""

from collections.abc import Callable, Sequence

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
