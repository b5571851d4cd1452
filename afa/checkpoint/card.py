"""The model card of an ensemble, README.md in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
{metadata}
---

# An ensemble of {count} diffusion models

Adaptive Feature Aggregation ([arXiv:2405.17082](https://arxiv.org/abs/2405.17082)): the experts below run in
lockstep, and after {fused} of {stages} stages a trained aggregator weighs their features at every pixel.

    from afa import Ensemble  # pip install afa
    pipeline = Ensemble.from_pretrained("{place}").pipeline()  # a stock diffusers pipeline
    image = pipeline("a prompt").images[0]

| expert | source | predicts | licence |
|---|---|---|---|
{experts}

Aggregators: {kind} ({options}), placement {placement}, {parameters:,} parameters.
VAE, tokenizer, scheduler: {frame}.

{training}

The experts keep their own licences; `afa.json` records where each came from and the sha256 of its files.
"""


@dataclass(frozen=True)
class Origin:
    """What the manifest does not say about where an ensemble comes from.

    license:  of the ensemble, given by its author; None: the experts', if all have the same
    licences: of the experts, by name; None: not known
    bases:    repositories of experts that were copied in
    """

    license: str | None = None
    licences: Mapping[str, str | None] = field(default_factory=dict)
    bases: Sequence[str] = ()

    def metadata(self) -> dict[str, str]:
        """The keys of the card's metadata; none if a licence is not known."""
        if self.license is not None:
            return {"license": self.license}
        if not self.licences or None in self.licences.values():
            return {}
        known = sorted({str(licence) for licence in self.licences.values()})
        return (
            {"license": known[0]}
            if len(known) == 1
            else {"license": "other", "license_name": "of-the-experts"}
        )


def model_card(manifest: Manifest, origin: Origin | None = None, repository: str | None = None) -> str:
    """The README.md of an ensemble, in Markdown with the hub's metadata.

    origin:     None: not known
    repository: org/name; None: a folder
    """
    origin = origin or Origin()
    fused = [stage for stage in manifest.stages if stage["fused"]]
    placement = manifest.placement if isinstance(manifest.placement, str) else ", ".join(manifest.placement)
    return CARD.format(
        metadata=_metadata(manifest, origin, repository),
        place=repository or "PATH_OF_THIS_FOLDER",
        count=len(manifest.experts),
        fused=len(fused),
        stages=len(manifest.stages),
        experts="\n".join(_row(expert, origin) for expert in manifest.experts),
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


def bases(manifest: Manifest) -> list[str]:
    """The repositories of the experts that are on the hub."""
    sources = [expert.source for expert in manifest.experts if expert.commit]
    return ["/".join(source.split("/")[:2]) for source in sources if HUB_ID.fullmatch(source)]


def _metadata(manifest: Manifest, origin: Origin, repository: str | None) -> str:
    """The card's metadata, which the hub reads; YAML quotes whatever a stranger has written."""
    from huggingface_hub import EvalResult, ModelCardData

    repositories = list(dict.fromkeys([*bases(manifest), *origin.bases]))
    relation = {"base_model": repositories, "base_model_relation": "merge"} if repositories else {}
    losses = (manifest.training or {}).get("held_out_loss")
    measured: dict[str, Any] = {}
    if losses is not None:
        loss = EvalResult(
            task_type="text-to-image",
            dataset_type="held-out",
            dataset_name=f"{losses['trained'].get('n', 'the')} images held out of the training",
            metric_type="loss",
            metric_name="held-out loss",
            metric_value=losses["trained"]["value"],
        )
        measured = {"model_name": repository or "ensemble", "eval_results": [loss]}
    tags = ["afa", "diffusers", "text-to-image"]
    data = ModelCardData(
        library_name="afa",
        pipeline_tag="text-to-image",
        tags=tags,
        **origin.metadata(),
        **relation,
        **measured,
    )
    return str(data.to_yaml(line_break="\n")).strip()


def _row(expert: ExpertEntry, origin: Origin) -> str:
    loras = "".join(
        f" + {markdown_words(public_place(lora['path']))} × {lora['strength']:g}" for lora in expert.loras
    )
    commit = f" @ {expert.commit[:12]}" if expert.commit else ""
    source = markdown_words(expert.source if expert.commit else public_place(expert.source))
    return (
        f"| {markdown_words(expert.name)} | {source}{commit}{loras} | "
        f"{markdown_words(expert.prediction_type or 'unknown')} | "
        f"{markdown_words(origin.licences.get(expert.name) or 'see its source')} |"
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
