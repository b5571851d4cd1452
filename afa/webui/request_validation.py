"""Check on the server what a run asks for; callers of the API do not pass through the widgets of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afa.denoiser.hooks import check_strengths
from afa.errors import UserError, unknown
from afa.seeds import DRAW, draw_seed
from afa.settings import SEEDS

LONGEST = 4000  # characters of a prompt
MOST = 10**6  # of steps and stages that are looked at, before it is known how many a picture has
STRONGEST = 2.0  # of an expert, as the sliders have it


@dataclass(frozen=True)
class Limits:
    """What a run may ask for. unit: sides are multiples of it, in pixels. side: the largest; own: the experts' own."""

    images: int
    steps: int
    side: int
    unit: int
    own: int


@dataclass(frozen=True)
class RunRequest:
    """One run: every method makes `images` pictures, of the seeds seed, seed + 1 …, where -1 is one that was drawn; None: the experts' own."""

    prompt: str
    methods: tuple[str, ...]
    negative_prompt: str | None
    seed: int
    images: int
    steps: int
    guidance: float | None
    true_guidance: float | None
    scheduler: str | None
    width: int | None
    height: int | None
    strengths: Mapping[str, float]


def validate_request(
    given: Mapping[str, Any],
    limits: Limits,
    methods: Sequence[str],
    experts: tuple[str, ...],
    schedulers: Sequence[str],
) -> RunRequest:
    """What was given, as an order. Raises UserError for the first thing that is not as it must be."""
    scheduler = given.get("scheduler") or None
    if scheduler is not None and scheduler not in schedulers:
        raise UserError(unknown(str(scheduler), schedulers, "scheduler for these experts,"))
    seed = whole("seed", given.get("seed", 0), DRAW, SEEDS - 1)
    return RunRequest(
        prompt=_prompt(given.get("prompt")),
        methods=_methods(given.get("methods"), methods),
        negative_prompt=text("negative prompt", given.get("negative_prompt")) or None,
        seed=draw_seed() if seed == DRAW else seed,
        images=whole("images", given.get("images", 1), 1, limits.images),
        steps=whole("steps", given.get("steps", 20), 1, limits.steps),
        guidance=_number("guidance", given.get("guidance"), 0, 100),
        true_guidance=_number("true guidance", given.get("true_guidance"), 0, 100),
        scheduler=scheduler,
        width=_side("width", given.get("width"), limits),
        height=_side("height", given.get("height"), limits),
        strengths=make_strengths(given.get("strengths") or {}, experts),
    )


def make_strengths(given: Mapping[str, Any], experts: tuple[str, ...]) -> dict[str, float]:
    """Strengths of all experts, 1 for those left out. Raises UserError for others, and if all are off."""
    if not isinstance(given, Mapping):
        raise UserError(f"strengths must be numbers by expert's name, such as {{'{experts[0]}': 0.5}}")
    for name in given:
        if name not in experts:
            raise UserError(unknown(str(name), experts, "expert"))
    strengths = {
        name: _number(f"the strength of {name}", given.get(name, 1.0), 0, STRONGEST) for name in experts
    }
    found = {name: 1.0 if value is None else value for name, value in strengths.items()}
    try:
        check_strengths(experts, found)
    except ValueError as error:
        raise UserError(str(error)) from None
    return found


def _prompt(value: Any) -> str:
    prompt = text("prompt", value)
    if not prompt:
        raise UserError("there is no prompt; write what the image shall show")
    return prompt


def text(name: str, value: Any) -> str:
    """A text without spaces around it; None is empty. Raises UserError for what is none, or too long."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"the {name} must be text, not {type(value).__name__}")
    found = (value or "").strip()
    if len(found) > LONGEST:
        raise UserError(f"the {name} has {len(found):,} characters; give at most {LONGEST:,}")
    return found


def _methods(value: Any, known: Sequence[str]) -> tuple[str, ...]:
    chosen = [value] if isinstance(value, str) else value or []
    if not isinstance(chosen, (list, tuple)):
        raise UserError(f"methods must be a list of names, not {type(value).__name__}")
    if not chosen:
        raise UserError("no method is chosen; choose at least one")
    for name in chosen:
        if name not in known:
            raise UserError(unknown(str(name)[:80], known, "method"))
    return tuple(name for name in known if name in chosen)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number, also as text, exact however large. Raises UserError."""
    exact = value if isinstance(value, int) and not isinstance(value, bool) else _digits(value)
    if exact is None:
        number = _number(name, value, least, most)
        if number is None or number != int(number):
            raise UserError(
                f"{name} must be a whole number from {least} to {most}, not {'empty' if number is None else f'{number:g}'}"
            )
        exact = int(number)
    if not least <= exact <= most:
        raise UserError(f"{name} {str(exact)[:40]} is out of bounds; give a number from {least} to {most}")
    return exact


def _digits(value: Any) -> int | None:
    """The number that a text of digits is."""
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 40 else None


def _number(name: str, value: Any, least: float, most: float) -> float | None:
    """Empty is None."""
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} must be a number from {least:g} to {most:.16g}, not {str(value)[:40]!r}")
    if not least <= number <= most:
        raise UserError(f"{name} {number:.16g} is out of bounds; give a number from {least:g} to {most:.16g}")
    return number


def _side(name: str, value: Any, limits: Limits) -> int | None:
    """0 and empty: the experts' own."""
    if value in (None, "", 0):
        return None
    side = whole(name, value, limits.unit, limits.side)
    if side % limits.unit:
        raise UserError(
            f"{name} {side} must be a multiple of {limits.unit} pixels; {max(1, round(side / limits.unit)) * limits.unit} is the nearest"
        )
    return side
