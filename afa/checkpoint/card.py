"""The model card of a saved ensemble: what it is made of, how to load it, what its training measured."""

from afa.checkpoint.manifest import ExpertEntry, Manifest

SHOWN = ("lr", "batch_size", "accumulate", "warm_up", "weight_decay", "ema", "caption_dropout", "resolution", "seed", "dtype")  # of the options
CARD = """---
library_name: afa
pipeline_tag: text-to-image
tags: [afa, diffusers, text-to-image]
{bases}---

# An ensemble of {count} diffusion models

Adaptive Feature Aggregation ([arXiv:2405.17082](https://arxiv.org/abs/2405.17082)): the experts below run in lockstep, and
after {fused} of {stages} stages a trained aggregator weighs their features at every pixel.

    from afa import Ensemble
    image = Ensemble.load("PATH_OF_THIS_FOLDER").pipeline()("a prompt").images[0]

| expert | source | predicts |
|---|---|---|
{experts}

Aggregators: {kind} ({options}), placement {placement}, {parameters:,} parameters.
VAE, tokenizer, scheduler: {frame}.

{training}

The experts keep their own licences; `afa.json` records where each came from and the sha256 of its files.
"""


def model_card(manifest: Manifest) -> str:
    """The README.md of an ensemble, in Markdown with the hub's metadata."""
    bases = [expert.source for expert in manifest.experts if expert.commit]
    fused = [stage for stage in manifest.stages if stage["fused"]]
    placement = manifest.placement if isinstance(manifest.placement, str) else ", ".join(manifest.placement)
    return CARD.format(
        bases="".join(["base_model:\n", *(f"- {base}\n" for base in bases)]) if bases else "",
        count=len(manifest.experts),
        fused=len(fused),
        stages=len(manifest.stages),
        experts="\n".join(_row(expert) for expert in manifest.experts),
        kind=manifest.aggregator["kind"],
        options=", ".join(f"{name} {value}" for name, value in manifest.aggregator["options"].items()) or "defaults",
        placement=placement,
        parameters=manifest.aggregator["parameters"],
        frame=", ".join(f"{part} of {choice}" for part, choice in manifest.frame.items()),
        training=_training(manifest),
    )


def _row(expert: ExpertEntry) -> str:
    loras = "".join(f" + {lora['path']} × {lora['strength']:g}" for lora in expert.loras)
    commit = f" @ {expert.commit[:12]}" if expert.commit else ""
    return f"| {expert.name} | {expert.source}{commit}{loras} | {expert.prediction_type or 'unknown'} |"


def _training(manifest: Manifest) -> str:
    """What training measured, and with which options. Tolerates records without a measurement (aggregators from elsewhere)."""
    record = manifest.training
    if record is None:
        return "No training was recorded; untrained aggregators are the mean of the experts' features."
    if "held_out_loss" not in record:
        return "\n".join(["Training:", "", *(f"* {name}: {value}" for name, value in record.items())])
    losses = record["held_out_loss"]
    rows = [f"| {name} | {value['value']:.5f} [{value['low']:.5f}, {value['high']:.5f}] |" for name, value in losses.items()]
    change, settings = record["difference_to_best_expert"], record["settings"]
    options = ", ".join(f"{name} {settings[name]}" for name in SHOWN if name in settings)
    return "\n".join(
        [
            f"Trained for {record['steps']} steps on {record['training_images']} images; the average of step {record['best_step']} was kept.",
            "It was the best of those measured on the held-out images below, which favours it a little.",
            "",
            f"| held-out loss, n = {losses['trained']['n']} | mean [95 % interval] |",
            "|---|---|",
            *rows,
            "",
            f"Trained minus best expert ({record['best_expert']}), paired: {change['value']:+.5f} [{change['low']:+.5f}, {change['high']:+.5f}].",
            "",
            f"Options: {options}.",
        ]
    )
