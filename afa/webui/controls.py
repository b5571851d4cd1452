"""Controls of the form: settings, strengths, options of methods, regions, the seed with its buttons."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import gradio as gr

from afa.errors import UserError
from afa.prompt_syntax import PLAIN, SYNTAXES
from afa.sampling.options import MethodOptions
from afa.sampling.regions import Region, read_region
from afa.seeds import DRAW
from afa.settings import choices_of, kind_of
from afa.text_files import parse_json
from afa.webui import markup
from afa.webui.engine import Engine
from afa.webui.request_validation import STRONGEST, text

SHOWN = 20  # names of LoRAs in the form
OPTION = "option:"  # of the names of fields: option:METHOD:NAME
READ_MASK = "(...values) => { values[values.length - 1] = window.afaMask(); return values; }"
CLEAR_MASK = "() => window.afaPaint('clear')"


def shown_option(value: Any) -> str:
    """Return the value of an option as the form shows it, as --method-option takes it; "" for None."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(shown_option, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_fields(engine: Engine, steps: int, guidance: float | None) -> dict[str, Any]:
    """Add the settings of a run; returns the inputs by their names in a request, and the button `last`."""
    fields: dict[str, Any] = {}
    half: dict[str, Any] = {"min_width": 140}
    with gr.Row():
        fields["steps"] = gr.Slider(
            1, engine.limits.steps, value=steps, step=1, label="Steps", elem_id="afa-steps", **half
        )
        fields["guidance"] = gr.Number(
            value=guidance, label="Guidance", info="1: off; empty: the experts' own", **half
        )
    fields |= seed_row()
    fields["images"] = gr.Slider(1, engine.limits.images, value=1, step=1, label="Images a method")
    with gr.Accordion("More settings", open=False):
        own = type(engine.ensemble.frame.scheduler).__name__
        fields["negative_prompt"] = gr.Textbox(
            label="Negative prompt", lines=2, placeholder="what they should not show"
        )
        syntaxes = [(about, name) for name, about in SYNTAXES.items()]
        fields["prompt_syntax"] = gr.Dropdown(
            syntaxes, value=PLAIN, label="Prompts are read", visible=engine.has_weighted_prompts
        )
        if engine.loras:
            named = ", ".join(engine.loras[:SHOWN]) + (" …" if len(engine.loras) > SHOWN else "")
            gr.HTML(markup.note(f"In A1111's syntax, <lora:NAME:0.8> takes a LoRA: {named}."))
        fields["scheduler"] = gr.Dropdown(
            [(f"the experts' own ({own})", ""), *engine.schedulers], value="", label="Scheduler"
        )
        with gr.Row():
            for side in ("width", "height"):
                info = f"multiple of {engine.limits.unit}, at most {engine.limits.side}; 0: the experts' own"
                label = f"{side.capitalize()} in pixels"
                fields[side] = gr.Number(value=0, precision=0, label=label, info=info, min_width=140)
        info = "beside the built-in one; empty: none"
        fields["true_guidance"] = gr.Number(
            value=None, label="True guidance", info=info, visible=engine.has_true_guidance
        )
    return fields


def strength_sliders(engine: Engine) -> dict[str, Any]:
    """Add a strength slider for each expert; they are visible if a method uses them."""
    scaled = [method.title for method in engine.methods.values() if method.scalable]
    with gr.Accordion("Strength of each expert", open=True, visible=bool(scaled)):
        info = f"A strength scales the expert's weights in {' and '.join(scaled)}."
        gr.HTML(markup.note(f"{info} Moved during a run, it takes effect at the next stage."))
        names = engine.ensemble.names
        sliders = [
            gr.Slider(0, STRONGEST, value=1, step=0.05, label=name, elem_classes="afa-strength")
            for name in names
        ]
        live = gr.Checkbox(value=True, label="Draw again after a strength has changed", elem_id="afa-live")
    return {"strengths": sliders, "live": live}


def option_fields(engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the options of every method that has some; they are visible if the method is chosen.

    Returns the inputs by their names in the form, and method -> its group.
    """
    fields: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    chosen = next(iter(engine.methods))
    for method in engine.methods.values():
        if method.options is None:
            continue
        with gr.Accordion(
            f"Options of {method.title}", visible=method.name == chosen, elem_classes="afa-options"
        ) as groups[method.name]:
            for field in dataclasses.fields(method.options):
                fields[f"{OPTION}{method.name}:{field.name}"] = _option(method.options, field)
    return fields, groups


def _option(options: type[MethodOptions], field: "dataclasses.Field[Any]") -> Any:
    kind, several = kind_of(typing.get_type_hints(options)[field.name])
    label, default, help = field.name.replace("_", " "), field.default, field.metadata["help"]
    bounds = field.metadata["bounds"]
    limits = [f"{name} {bounds[name]:g}" for name in ("least", "above", "most", "below") if name in bounds]
    info = f"{help} ({', '.join(limits)})" if limits else help
    choices = choices_of(field)
    if choices is not None:
        return gr.Dropdown(choices, value=default, label=label, info=info)
    if kind in (int, float) and not several:
        return gr.Number(value=default, label=label, info=info)
    return gr.Textbox(value=shown_option(default), label=label, info=info, max_lines=1)


def given_options(values: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return method -> option -> value of the form's fields, for the chosen methods and filled fields."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name.startswith(OPTION) and value not in (None, ""):
            _, method, option = name.split(":")
            if method in methods:
                found.setdefault(method, {})[option] = value
    return found


def filled_options(engine: Engine, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of all option fields: those given, and defaults elsewhere."""
    values: dict[str, Any] = {}
    for method in engine.methods.values():
        for field in dataclasses.fields(method.options) if method.options else ():
            value = given.get(method.name, {}).get(field.name, field.default)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            values[f"{OPTION}{method.name}:{field.name}"] = value if number else shown_option(value)
    return values


def seed_row() -> dict[str, Any]:
    """Add the seed with its buttons: a random one for every run, and that of the last run."""
    with gr.Row(elem_id="afa-seed-row"):
        seed = gr.Textbox(
            value="0",
            max_lines=1,
            label="Seed",
            info="one more for each next image; -1: random",
            min_width=140,
        )
        with gr.Column(scale=0, min_width=96, elem_id="afa-seed-buttons"):
            random = gr.Button("Random", size="sm", elem_id="afa-random")
            last = gr.Button("Last", size="sm", elem_id="afa-last")
    random.click(None, None, seed, js=f"() => '{DRAW}'", api_visibility="private")
    return {"seed": seed, "last": last}


def regions_of(engine: Engine) -> dict[str, Any]:
    """Add regions: the list that a run uses, and the controls that change it."""
    names = engine.ensemble.names
    scaled = [method.title for method in engine.methods.values() if method.scalable]
    script = resources.files("afa.pages").joinpath("templates/webui_mask.js").read_text("utf-8")
    with gr.Accordion(
        "Regions: who draws where and when", open=False, visible=bool(scaled), elem_id="afa-regions"
    ):
        gr.HTML(
            markup.note(
                "A region multiplies an expert's weights where you paint, in a part of the steps; all of the "
                f"picture if nothing is painted. It acts in {' and '.join(scaled)}."
            )
        )
        gr.HTML(markup.canvas(), js_on_load=script, elem_id="afa-canvas")
        with gr.Row():
            expert = gr.Dropdown(list(names), value=names[0], label="Expert", min_width=120)
            strength = gr.Slider(
                0,
                STRONGEST,
                value=0,
                step=0.05,
                label="Strength",
                min_width=140,
                elem_id="afa-region-strength",
            )
        with gr.Row():
            share: dict[str, Any] = {"step": 0.05, "min_width": 140}
            start = gr.Slider(0, 1, value=0, label="Steps from", **share)
            end = gr.Slider(0, 1, value=1, label="to", **share)
        mask = gr.Textbox(visible=False)
        with gr.Row():
            add = gr.Button("Add region", size="sm", min_width=110, elem_id="afa-add-region")
            undo = gr.Button("Remove the last", size="sm", min_width=110, elem_id="afa-remove-region")
        listed = gr.HTML(markup.regions([]), elem_id="afa-region-list")
    regions = gr.State([])
    form = {"regions": regions, "listed": listed, "add": add, "undo": undo}
    return form | {"given": [regions, expert, strength, start, end, mask]}


def add_region(
    names: Sequence[str],
    regions: Sequence[Mapping[str, Any]],
    expert: str,
    strength: float,
    start: float,
    end: float,
    mask: str | None,
) -> list[dict[str, Any]]:
    """Return the regions with one more. mask: JSON of Region.mask, or empty. Raises UserError."""
    if mask and len(mask) > 200_000:
        raise UserError(f"the mask has {len(mask):,} characters; paint a simpler one")
    given = {"expert": text("expert", expert), "strength": strength, "start": start, "end": end}
    found = parse_json(mask, "the mask") if mask else None
    return [*map(dict, regions), read_region(given | {"mask": found}, names).record()]


def shown_regions(regions: Sequence[Mapping[str, Any]]) -> str:
    """Return the list of regions as HTML."""
    return markup.regions([Region(**region) for region in regions])
