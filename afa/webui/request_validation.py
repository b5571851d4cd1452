"""Validate requests on the server, since callers of the API do not use the widgets of the page."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afa.denoiser.hooks import check_strengths
from afa.errors import UserError, unknown
from afa.prompt_syntax import PLAIN, SYNTAXES
from afa.sampling.options import MethodOptions
from afa.sampling.regions import MOST as MOST_REGIONS
from afa.sampling.regions import Region, read_region
from afa.sampling.registry import read_options
from afa.seeds import DRAW, draw_seed
from afa.settings import SEEDS

LONGEST = 4000  # characters of a prompt
MOST = 10**6  # the largest step or stage index that is accepted before the picture is known
STRONGEST = 2.0  # the largest strength of an expert


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    images: of each method
    steps:  denoising steps
    side:   largest height and width in pixels
    unit:   height and width are multiples of it, in pixels
    own:    the experts' own side in pixels
    """

    images: int
    steps: int
    side: int
    unit: int
    own: int


@dataclass(frozen=True)
class RunRequest:
    """A valid request; None stands for the experts' own value.

    prompt:          text
    methods:         names of methods, each of which makes `images` pictures
    negative_prompt: text
    seed:            of the first picture; picture k has seed + k
    images:          number of pictures of each method
    steps:           denoising steps
    guidance:        strength from 0 to 100
    true_guidance:   strength from 0 to 100 of classifier-free guidance beside a built-in one
    scheduler:       its name
    width, height:   in pixels
    strengths:       expert -> factor of its weight, from 0 to STRONGEST
    prompt_syntax:   how prompts are read, see afa.prompt_syntax
    regions:         strengths in parts of the picture and of the steps
    method_options:  method -> its options; missing methods have their own defaults
    """

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
    prompt_syntax: str = PLAIN
    regions: tuple[Region, ...] = ()
    method_options: Mapping[str, MethodOptions] = field(default_factory=dict)


def validate_request(
    given: Mapping[str, Any],
    limits: Limits,
    methods: Sequence[str],
    experts: tuple[str, ...],
    schedulers: Sequence[str],
    optional: Collection[str] = (),
) -> RunRequest:
    """Check the values of a request.

    given:      field -> value; missing fields have defaults
    limits:     see Limits
    methods:    names of all methods
    experts:    names of the experts
    schedulers: names of the schedulers that fit the experts
    optional:   names of the methods that have options
    A seed of -1 is replaced by a random one. Raises UserError for the first invalid value.
    """
    scheduler = given.get("scheduler") or None
    if scheduler is not None and scheduler not in schedulers:
        raise UserError(unknown(str(scheduler), schedulers, "scheduler for these experts,"))
    syntax = given.get("prompt_syntax") or PLAIN
    if syntax not in SYNTAXES:
        raise UserError(unknown(str(syntax)[:80], SYNTAXES, "prompt syntax"))
    chosen = _methods(given.get("methods"), methods)
    seed = whole("seed", given.get("seed", 0), DRAW, SEEDS - 1)
    return RunRequest(
        prompt=_prompt(given.get("prompt")),
        methods=chosen,
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
        prompt_syntax=syntax,
        regions=_regions(given.get("regions"), experts),
        method_options=_method_options(given.get("method_options"), methods, chosen, optional),
    )


def _regions(value: Any, experts: tuple[str, ...]) -> tuple[Region, ...]:
    if not isinstance(value or [], (list, tuple)):
        raise UserError(f"regions must be a list, not {type(value).__name__}")
    if len(value or ()) > MOST_REGIONS:
        raise UserError(f"{len(value)} regions are given; give at most {MOST_REGIONS}")
    return tuple(read_region(one, experts) for one in value or ())


def _method_options(
    value: Any, methods: Sequence[str], chosen: Sequence[str], optional: Collection[str]
) -> dict[str, MethodOptions]:
    """Read the options of methods, given as values or as texts."""
    if not isinstance(value or {}, Mapping) or not all(
        isinstance(one, Mapping) for one in (value or {}).values()
    ):
        raise UserError("method options must be options by method, such as {'expert_switch': {'every': 2}}")
    found = {}
    for method, options in (value or {}).items():
        if method not in methods:
            raise UserError(unknown(str(method)[:80], methods, "method"))
        if method not in optional or method not in chosen:
            why = "has no options" if method not in optional else "is not chosen"
            raise UserError(f"options of {method} are given, which {why}; leave them out")
        texts = [f"{text('option', name)}={_as_text(one)}" for name, one in options.items()]
        try:
            found[method] = read_options(method, texts)
        except UserError as error:
            raise UserError(f"{method}: {str(error).removeprefix('--method-option ')}") from None
    return found


def _as_text(value: Any) -> str:
    """Write an option as --method-option takes it."""
    words = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text("option", words.removesuffix(".0") if isinstance(value, float) else words)


def make_strengths(given: Mapping[str, Any], experts: tuple[str, ...]) -> dict[str, float]:
    """Return the strengths of all experts, 1 where none is given.

    Raises UserError for an unknown expert, an invalid strength, and if all strengths are 0.
    """
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
        raise UserError("there is no prompt; write what the image should show")
    return prompt


def text(name: str, value: Any) -> str:
    """Return a stripped text; "" for None. Raises UserError for other types and for long texts."""
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
    """Return an integer between bounds, from a number or its text, without rounding. Raises UserError."""
    exact = value if isinstance(value, int) and not isinstance(value, bool) else _digits(value)
    if exact is None:
        number = _number(name, value, least, most)
        if number is None or number != int(number):
            shown = "empty" if number is None else f"{number:g}"
            raise UserError(f"{name} must be a whole number from {least} to {most}, not {shown}")
        exact = int(number)
    if not least <= exact <= most:
        raise UserError(f"{name} {str(exact)[:40]} is out of bounds; give a number from {least} to {most}")
    return exact


def _digits(value: Any) -> int | None:
    """Return the integer that a text of digits spells, else None."""
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 40 else None


def _number(name: str, value: Any, least: float, most: float) -> float | None:
    """Return a finite number between bounds; None for an empty value. Raises UserError."""
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
    """Return a side in pixels; None for 0 and empty values. Raises UserError."""
    if value in (None, "", 0):
        return None
    side = whole(name, value, limits.unit, limits.side)
    if side % limits.unit:
        near = max(1, round(side / limits.unit)) * limits.unit
        raise UserError(f"{name} {side} must be a multiple of {limits.unit} pixels; {near} is the nearest")
    return side
