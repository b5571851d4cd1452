"""The facts of `afa inspect` as tables."""

from typing import Any

from afa.pages.numbers import count, scaled
from afa.pages.tables import listing


def report(facts: dict[str, Any]) -> str:
    """Experts, what goes with them, stages, whether they can be fused, and the cost."""
    parts = [
        section("experts", _experts(facts["experts"])),
        section("text encoders", _text_encoders(facts["experts"])),
        section("VAE", _vaes(facts["experts"])),
        section(f"stages of '{facts['experts'][0]['name']}'" if facts["mismatches"] else "stages", _stages(facts["stages"])),
        section("aggregators", _aggregators(facts)) if facts["aggregators"] else None,
        section("placements", _placements(facts)) if facts["placements"] else None,
        section("fusion", _fusion(facts)),
        section(_title(facts["cost"]), _cost(facts)),
    ]
    return "\n\n".join(part for part in parts if part)


def section(title: str, body: str) -> str:
    """A titled part of a report, indented by two."""
    return "\n".join([title, *(f"  {line}" if line else "" for line in body.splitlines())])


def _experts(experts: list[dict[str, Any]]) -> str:
    headers = ["name", "source", "family", "class", ">parameters", "stored as", "predicts"]
    rows = [
        [e["name"], _source(e), e["family"], e["class"], count(e["parameters"]), e["dtype"], _prediction(e)]
        for e in experts
    ]
    return listing(headers, rows)


def _prediction(expert: dict[str, Any]) -> str | None:
    """What an expert predicts, and at which noise if that is unusual."""
    noise = {"zero_snr": ", zero terminal SNR", "edm": ", EDM noise"}.get(expert["noise"], "")
    return f"{expert['prediction_type']}{noise}" if expert["prediction_type"] else None


def _source(expert: dict[str, Any]) -> str:
    """Where an expert comes from, with commit, LoRAs, and the config of a single file."""
    commit = f"@{expert['commit'][:12]}" if expert["commit"] else ""
    config = f" ({expert['config']})" if expert["config"] and not expert["source"].startswith("config ") else ""
    return f"{expert['source']}{commit}{''.join(f'+{lora}' for lora in expert['loras'])}{config}"


def _text_encoders(experts: list[dict[str, Any]]) -> str:
    rows = [
        [expert["name"], text["part"], text["class"], text["width"], count(text["parameters"]), text["dtype"], text["same_as"]]
        for expert in experts
        for text in expert["text_encoders"]
    ]
    headers = ["expert", "part", "class", ">width", ">parameters", "stored as", "same as"]
    return listing(headers, rows) if rows else "none; the experts are bare denoisers"


def _vaes(experts: list[dict[str, Any]]) -> str:
    headers = ["expert", "class", "latent", ">channels", ">scale", ">parameters", "stored as"]
    rows = [[expert["name"], *_vae(expert["vae"])] for expert in experts if expert["vae"]]
    return listing(headers, rows) if rows else "none; give one with vae="


def _vae(vae: dict[str, Any]) -> list[object]:
    size = [f"1/{vae['factor']}", vae["latent_channels"], vae["scaling_factor"]]
    return [vae["class"], *size, count(vae["parameters"]), vae["dtype"]]


def _stages(stages: list[dict[str, Any]]) -> str:
    headers = ["stage", ">channels", "size", "block", "skip", "fused", ">aggregator parameters", ">its FLOPs a step"]
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
    up_to = "" if made["attention_up_to"] is None else f", attention up to {made['attention_up_to']} latent pixels"
    placement = made["placement"] if isinstance(made["placement"], str) else ",".join(made["placement"])
    lines = [
        f"{made['kind']}{f' ({options})' if options else ''}{up_to}, {count(made['parameters'])} parameters",
        f"placement {placement}: {made['fused']} of {len(facts['stages'])} stages are fused",
    ]
    if facts["ensemble"]:
        recorded = [f"{name} {value}" for name, value in (made["training"] or {}).items() if not isinstance(value, (dict, list))]
        lines.append(f"saved in {facts['ensemble']}; {'trained: ' + ', '.join(recorded) if recorded else 'no training recorded'}")
    return "\n".join(lines)


def _placements(facts: dict[str, Any]) -> str:
    """The aggregators' cost where fewer stages are fused; that of a step is over the experts' own."""
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
        return "\n".join(["these experts cannot be fused:", *(f"- {reason}" for reason in facts["mismatches"])])
    names = [expert["name"] for expert in facts["experts"]]
    return "a single expert, nothing to compare" if len(names) == 1 else f"{', '.join(names)} can be fused: no mismatch"


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
        notes.append(f"A step of the ensemble costs {times:.2f} times that of '{first['name']}'.")
    return "\n".join([listing(["", ">parameters", ">float32", ">float16", ">FLOPs a step"], there), *notes])


def _guidance(cost: dict[str, Any]) -> str:
    if cost["guidance_doubles"]:
        return "Guidance doubles the FLOPs of a step."
    return "Guidance is built in, or there is none: a step is one pass."


def _row(title: str, parameters: int | None, flops: int | None) -> list[str | None]:
    """One line of the cost table; 4 and 2 bytes a parameter."""
    sizes = [None if parameters is None else scaled(width * parameters, "B") for width in (4, 2)]
    return [title, count(parameters), *sizes, scaled(flops, "FLOP")]
