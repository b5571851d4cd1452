"""Show experts, whether they can be fused, and what their ensemble would cost; no weights are loaded.

Reads config files and the headers of weight files, so that broken, incomplete and incompatible models are
found before any computation. A saved ensemble is shown with its experts and aggregators. Hub ids are
downloaded once.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa import defaults
from afa.aggregators.registry import AGGREGATORS, EVERYWHERE, Recipe
from afa.aggregators.settings import ATTENTION_HELP, AggregatorSettings, with_aggregator_options
from afa.errors import UserError
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.pages.numbers import count, scaled
from afa.pages.tables import listing
from afa.settings import COUNT, DEVICE_HELP, FRAME_HELP, RESIDENT, STORES, TEXT_ENCODER_HELP, VAE_HELP, option

if TYPE_CHECKING:
    from afa.inspection import Subject

EXAMPLES = [
    "afa inspect demo:curves demo:angles demo:patterns",
    "afa inspect demo:curves demo:angles --placement out --json",
    "afa inspect demo:ensemble",
    "afa inspect --config flux --count 2 --placement double",
    "afa inspect --config sd15 --count 3 --memory resident int8 delta2",
]


@with_aggregator_options
@dataclass(frozen=True, kw_only=True)
class InspectSettings(AggregatorSettings):
    """The settings of `afa inspect`: what to show, and how the experts would be fused."""

    experts: list[str] = option(
        [],
        place=True,
        ensemble=True,
        help="a diffusers folder, .safetensors file of original layout or org/name@revision,"
        " each optionally NAME=… and …+LORA; or one saved ensemble",
        positional=True,
    )
    config: str | None = option(
        None,
        help=f"architecture of single files: {', '.join(KNOWN_CONFIGS)}, or a folder; without EXPERT, the "
        "architecture to show",
    )
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    frame: str | None = option(None, place=True, help=FRAME_HELP)
    text_encoder: list[str] | None = option(None, place=True, help=TEXT_ENCODER_HELP)
    vae: str | None = option(None, place=True, help=f"with --frame or --text-encoder: {VAE_HELP}")
    count: int | None = option(
        None, least=1, most=1000, help="with --config and without EXPERT: how many experts (default: 3)"
    )
    aggregator: str | None = option(
        None,
        help=f"kind of aggregator: {' or '.join(', '.join(AGGREGATORS).rsplit(', ', 1))} "
        f"(default: {defaults.AGGREGATOR})",
    )
    placement: str | None = option(
        None,
        help="fused stages: layers (all), blocks, every-K, double (FLUX), out, or names such as M00,OUT11"
        " (default: the family's)",
    )
    attention_up_to: int | None = option(
        None,
        least=0,
        most=2**16,
        help=ATTENTION_HELP,
    )
    resolution: int | None = option(
        None, least=1, most=2**16, help="side of the images in pixels (default: the experts' own)"
    )
    batch_size: int = option(1, **COUNT, help="images at once; guidance doubles the cost of each")
    time: bool = option(
        False, help="also measure what a step takes on this device, with random weights; takes a few steps"
    )
    memory: list[str] | None = option(
        None,
        help="also count what a step needs in memory, with the experts' weights resident, or stored as by "
        "--store of afa generate; up to a minute for each with SDXL",
        choices=[RESIDENT, *STORES],
    )
    device: str | None = option(None, help=f"with --time: {DEVICE_HELP}")
    json: bool = option(False, help="print one JSON document instead of tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts and self.config is None:
            raise UserError(f"give EXPERT..., or --config with one of {', '.join(KNOWN_CONFIGS)}")
        for name in ("prediction_type", "frame", "text_encoder", "vae"):
            value = getattr(self, name)
            if not self.experts and value is not None:
                shown = value if isinstance(value, str) else " ".join(value)
                raise UserError(
                    f"--{name.replace('_', '-')} {shown} is for EXPERT, and none is given; leave it out"
                )
        if self.vae is not None and self.frame is None and self.text_encoder is None:
            raise UserError(
                f"--vae {self.vae} is for experts that are denoisers alone, with --text-encoder or --frame; "
                "give one of them, or leave it out"
            )
        if self.device is not None and not self.time:
            raise UserError(f"--device {self.device} is for --time; give both, or neither")
        if self.experts and self.count is not None:
            raise UserError(f"--count {self.count} is for --config without EXPERT; leave out one of them")


Options = InspectSettings


def run(options: Options) -> None:
    """Print the report; then, if the experts cannot be fused, raise UserError with every reason."""
    from afa.devices import choose_device
    from afa.inspection import facts

    device = choose_device(options.device) if options.time else None
    found = facts(_subject(options), options.resolution, options.batch_size, device, options.memory or ())
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(report(found))
    if found["mismatches"]:
        raise UserError("; ".join(found["mismatches"]))


def _subject(options: Options) -> "Subject":
    from afa.checkpoint.manifest import MANIFEST
    from afa.experts.donor import DonorSpec
    from afa.files import settled
    from afa.inspection import Subject

    ensembles = [source for source in options.experts if (settled(Path(source)) / MANIFEST).is_file()]
    if ensembles:
        _check_alone(options, ensembles[0])
        return Subject.from_ensemble(Path(ensembles[0]))
    recipe, placement = Recipe(), options.placement
    if options.experts:
        kind = options.prediction_type
        lent = DonorSpec(options.frame, tuple(options.text_encoder or ()), options.vae)
        found = Subject.from_sources(options.experts, options.config, recipe, placement, kind, lent)
    else:
        assert options.config is not None
        number = 3 if options.count is None else options.count
        found = Subject.from_config(options.config, number, recipe, placement)
    return found.sized(options.aggregator, options.aggregator_options(), options.attention_up_to)


def _check_alone(options: Options, ensemble: str) -> None:
    """Raise UserError for options that a saved ensemble defines itself."""
    if len(options.experts) > 1:
        other = next(source for source in options.experts if source != ensemble)
        raise UserError(f"{ensemble} is a saved ensemble; inspect it alone, without {other}")
    made = ("config", "prediction_type", "aggregator", "placement", "attention_up_to")
    made += ("frame", "text_encoder", "vae")
    names = (*made, *options.option_fields())
    for field in fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise UserError(
                f"{ensemble} is a saved ensemble with settings of its own;"
                f" leave out --{field.name.replace('_', '-')}"
            )


def report(facts: dict[str, Any]) -> str:
    """Format the report: experts, text encoders, VAE, stages, whether they can be fused, and the cost."""
    parts = [
        section("experts", _experts(facts["experts"])),
        section("text encoders", _text_encoders(facts["experts"])),
        section("VAE", _vaes(facts["experts"])),
        section(
            f"stages of '{facts['experts'][0]['name']}'" if facts["mismatches"] else "stages",
            _stages(facts["stages"]),
        ),
        section("aggregators", _aggregators(facts)) if facts["aggregators"] else None,
        section("placements", _placements(facts)) if facts["placements"] else None,
        section("fusion", _fusion(facts)),
        section(_title(facts["cost"]), _cost(facts)),
    ]
    return "\n\n".join(part for part in parts if part)


def section(title: str, body: str) -> str:
    """Format a titled section, indented by two."""
    return "\n".join([title, *(f"  {line}" if line else "" for line in body.splitlines())])


def _experts(experts: list[dict[str, Any]]) -> str:
    headers = ["name", "source", "family", "class", ">parameters", "stored as", "predicts"]
    rows = [
        [e["name"], _source(e), e["family"], e["class"], count(e["parameters"]), e["dtype"], _prediction(e)]
        for e in experts
    ]
    return listing(headers, rows)


def _prediction(expert: dict[str, Any]) -> str | None:
    """Return what an expert predicts, and its noise schedule if that is unusual."""
    noise = {"zero_snr": ", zero terminal SNR", "edm": ", EDM noise"}.get(expert["noise"], "")
    return f"{expert['prediction_type']}{noise}" if expert["prediction_type"] else None


def _source(expert: dict[str, Any]) -> str:
    """Return where an expert comes from, with commit, LoRAs, and the config of a single file."""
    commit = f"@{expert['commit'][:12]}" if expert["commit"] else ""
    config = (
        f" ({expert['config']})" if expert["config"] and not expert["source"].startswith("config ") else ""
    )
    return f"{expert['source']}{commit}{''.join(f'+{lora}' for lora in expert['loras'])}{config}"


def _text_encoders(experts: list[dict[str, Any]]) -> str:
    rows = [
        [
            expert["name"],
            text["part"],
            text["class"],
            text["width"],
            count(text["parameters"]),
            text["dtype"],
            text["same_as"],
        ]
        for expert in experts
        for text in expert["text_encoders"]
    ]
    headers = ["expert", "part", "class", ">width", ">parameters", "stored as", "same as"]
    shown = listing(headers, rows) if rows else "none; the experts are bare denoisers"
    return "\n".join([shown, *(expert["lacking"] for expert in experts if expert["lacking"])])


def _vaes(experts: list[dict[str, Any]]) -> str:
    headers = ["expert", "class", "latent", ">channels", ">scale", ">parameters", "stored as"]
    rows = [[expert["name"], *_vae(expert["vae"])] for expert in experts if expert["vae"]]
    return listing(headers, rows) if rows else "none; give one with --vae (in Python vae=)"


def _vae(vae: dict[str, Any]) -> list[object]:
    size = [f"1/{vae['factor']}", vae["latent_channels"], vae["scaling_factor"]]
    return [vae["class"], *size, count(vae["parameters"]), vae["dtype"]]


def _stages(stages: list[dict[str, Any]]) -> str:
    headers = [
        "stage",
        ">channels",
        "size",
        "block",
        "skip",
        "fused",
        ">aggregator parameters",
        ">its FLOPs a step",
    ]
    return listing(headers, [_stage(stage) for stage in stages])


def _stage(stage: dict[str, Any]) -> list[object]:
    skip = "saves" if stage["saves_skip"] else "takes" if stage["takes_skip"] else None
    fused = None if stage["fused"] is None else "yes" if stage["fused"] else "no"
    size = f"1/{2 ** stage['level']}"
    numbers = [count(stage["aggregator_parameters"]), scaled(stage["aggregator_flops"], "FLOP")]
    return [stage["name"], stage["channels"], size, stage["block"], skip, fused, *numbers]


def _aggregators(facts: dict[str, Any]) -> str:
    made = facts["aggregators"]
    options = ", ".join(f"{name} {value}" for name, value in made["options"].items())
    up_to = (
        ""
        if made["attention_up_to"] in (None, EVERYWHERE)
        else f", attention up to {made['attention_up_to']} latent pixels"
    )
    placement = made["placement"] if isinstance(made["placement"], str) else ",".join(made["placement"])
    lines = [
        f"{made['kind']}{f' ({options})' if options else ''}{up_to}, {count(made['parameters'])} parameters",
        f"placement {placement}: {made['fused']} of {len(facts['stages'])} stages are fused",
    ]
    if facts["ensemble"]:
        recorded = [
            f"{name} {value}"
            for name, value in (made["training"] or {}).items()
            if not isinstance(value, (dict, list))
        ]
        trained = "trained: " + ", ".join(recorded) if recorded else "no training recorded"
        lines.append(f"saved in {facts['ensemble']}; {trained}")
    return "\n".join(lines)


def _placements(facts: dict[str, Any]) -> str:
    """List the aggregators' cost at each placement; the last column is relative to the experts' cost."""
    experts = facts["cost"]["flops"]["experts"]
    rows = [
        [
            f"{one['placement']} (default)" if one["default"] else one["placement"],
            one["fused"],
            count(one["parameters"]),
            scaled(one["flops"], "FLOP"),
            f"{100 * one['flops'] / experts:.1f} %",
        ]
        for one in facts["placements"]
    ]
    return listing(["placement", ">fused stages", ">parameters", ">FLOPs a step", ">over the experts"], rows)


def _fusion(facts: dict[str, Any]) -> str:
    if facts["mismatches"]:
        return "\n".join(
            ["these experts cannot be fused:", *(f"- {reason}" for reason in facts["mismatches"])]
        )
    names = [expert["name"] for expert in facts["experts"]]
    return (
        "a single expert, nothing to compare"
        if len(names) == 1
        else f"{', '.join(names)} can be fused: no mismatch"
    )


def _title(cost: dict[str, Any]) -> str:
    height, width = cost["resolution"]
    images = "1 image" if cost["batch_size"] == 1 else f"{cost['batch_size']} images"
    return f"cost for {images} of {width}x{height} pixels (latent {cost['latent'][1]}x{cost['latent'][0]})"


def _cost(facts: dict[str, Any]) -> str:
    cost, experts, first = facts["cost"], facts["experts"], facts["experts"][0]
    flops, held, number = cost["flops"], cost["parameters"], len(experts)
    unique = sum(text["same_as"] is None for expert in experts for text in expert["text_encoders"])
    rows = [
        _row(f"one expert ({first['name']})", first["parameters"], flops["each_expert"][0]),
        _row(f"{number} experts", held["experts"] if number > 1 else None, flops["experts"]),
        _row("aggregators", held["aggregators"], flops["aggregators"]),
        _row(f"{unique} text encoder{'s' if unique > 1 else ''}", held["text_encoders"] or None, None),
        _row("VAE", held["vae"], None),
        _row("all" if facts["aggregators"] else "all, unfused", held["total"], flops["ensemble"]),
    ]
    there = [row for row in rows if row[1] is not None]
    notes = ["Memory is that of the weights; activations come on top.", _guidance(cost)]
    if flops["ensemble"]:
        times = flops["ensemble"] / flops["each_expert"][0]
        notes.append(
            f"A step of the ensemble needs {times:.2f} times the FLOPs of one of '{first['name']}'; "
            + (_time(cost["time"]) if cost["time"] else "--time measures how long it takes.")
        )
    if cost["memory"]:
        notes += ["", _memory(cost)]
    return "\n".join([listing(["", ">parameters", ">float32", ">float16", ">FLOPs a step"], there), *notes])


def _memory(cost: dict[str, Any]) -> str:
    rows = [
        [row["store"], *(scaled(row[part], "B") for part in ("experts", "step"))] for row in cost["memory"]
    ]
    passes = " with guidance" if cost["guidance_doubles"] else ""
    return "\n".join(
        [
            f"memory of a step{passes}, bfloat16, without text encoders and VAE (counted)",
            listing(["weights", ">experts", ">peak of a step"], rows),
        ]
    )


def _time(time: dict[str, Any]) -> str:
    least, middle, most = time["ratios"]
    return (
        f"on {time['device']} in {time['dtype']} it takes {middle:.2f} [{least:.2f}, {most:.2f}] times "
        f"as long ({time['ensemble']:.3g} s instead of {time['one_expert']:.3g} s; "
        f"median [smallest, largest] of {time['rounds']} rounds, random weights)."
    )


def _guidance(cost: dict[str, Any]) -> str:
    if cost["guidance_doubles"]:
        return "Guidance doubles the FLOPs of a step."
    return "Guidance is built in, or there is none: a step is one pass."


def _row(title: str, parameters: int | None, flops: int | None) -> list[str | None]:
    """Return one line of the cost table, with 4 and 2 bytes for each parameter."""
    sizes = [None if parameters is None else scaled(width * parameters, "B") for width in (4, 2)]
    return [title, count(parameters), *sizes, scaled(flops, "FLOP")]
