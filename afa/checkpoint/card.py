"""The model card of an ensemble, README.md in its folder."""

from afa.checkpoint.gains import gains
from afa.checkpoint.manifest import ExpertEntry, Manifest
from afa.places import HUB_ID, markdown_words, public_place
from afa.stats import Estimate

# options of the training that the card lists
SHOWN = (
    "lr",
    "batch_size",
    "accumulate",
    "warm_up",
    "weight_decay",
    "ema",
    "caption_dropout",
    "resolution",
    "seed",
    "dtype",
)
CARD = """---
library_name: afa
pipeline_tag: text-to-image
tags: [afa, diffusers, text-to-image]
{bases}---

# An ensemble of {count} diffusion models

Adaptive Feature Aggregation ([arXiv:2405.17082](https://arxiv.org/abs/2405.17082)): the experts below run in
lockstep, and after {fused} of {stages} stages a trained aggregator weighs their features at every pixel.

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
    bases = [
        expert.source for expert in manifest.experts if expert.commit and HUB_ID.fullmatch(expert.source)
    ]
    fused = [stage for stage in manifest.stages if stage["fused"]]
    placement = manifest.placement if isinstance(manifest.placement, str) else ", ".join(manifest.placement)
    return CARD.format(
        bases="".join(["base_model:\n", *(f"- {base}\n" for base in bases)]) if bases else "",
        count=len(manifest.experts),
        fused=len(fused),
        stages=len(manifest.stages),
        experts="\n".join(_row(expert) for expert in manifest.experts),
        kind=markdown_words(manifest.aggregator["kind"]),
        options=", ".join(f"{name} {value}" for name, value in manifest.aggregator["options"].items())
        or "defaults",
        placement=markdown_words(placement),
        parameters=manifest.aggregator["parameters"],
        frame=", ".join(
            f"{part} of {markdown_words(public_place(choice))}" for part, choice in manifest.frame.items()
        ),
        training=_training(manifest),
    )


def _row(expert: ExpertEntry) -> str:
    loras = "".join(
        f" + {markdown_words(public_place(lora['path']))} × {lora['strength']:g}" for lora in expert.loras
    )
    commit = f" @ {expert.commit[:12]}" if expert.commit else ""
    source = markdown_words(expert.source if expert.commit else public_place(expert.source))
    return (
        f"| {markdown_words(expert.name)} | {source}{commit}{loras} | "
        f"{markdown_words(expert.prediction_type or 'unknown')} |"
    )


def _training(manifest: Manifest) -> str:
    """What training measured, and its options.

    A record without measurements (aggregators from elsewhere) is listed key by key.
    """
    record = manifest.training
    if record is None:
        return "No training was recorded; untrained aggregators are the mean of the experts' features."
    if "held_out_loss" not in record:
        return "\n".join(
            [
                "Training:",
                "",
                *(f"* {markdown_words(name)}: {markdown_words(value)}" for name, value in record.items()),
            ]
        )
    losses = record["held_out_loss"]
    rows = [f"| {markdown_words(name)} | {Estimate(**value).words(5)} |" for name, value in losses.items()]
    settings = record["settings"]
    options = ", ".join(f"{name} {markdown_words(settings[name])}" for name in SHOWN if name in settings)
    return "\n".join(
        [
            (
                f"Trained for {record['steps']} steps on {record['training_images']} images; "
                f"the average of step {record['best_step']} was kept."
            ),
            "It was the best of those measured on the held-out images below, which favours it a little.",
            "",
            f"| held-out loss, n = {losses['trained']['n']} | mean [95 % interval] |",
            "|---|---|",
            *rows,
            "",
            *gains(record),
            "",
            f"Options: {options}.",
        ]
    )
