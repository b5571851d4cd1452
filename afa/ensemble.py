"""The ensemble: experts, their aggregators, and the frame (VAE, tokenizer, scheduler) they work in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.aggregators.table import Recipe
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.conversion import Conversion, conversion
from afa.denoiser.schedule import Schedule, kind_of
from afa.denoiser.table import DENOISERS
from afa.errors import UserError
from afa.experts.compatible import kind_mismatches, mismatches, only_predictions, scheduler_mismatches
from afa.experts.lending import lend
from afa.experts.load import Expert, load_experts
from afa.frame import Frame
from afa.loading import equip, load_into
from afa.places import located
from afa.text import EnsembleTextEncoder, join_text_encoders, width_of


class Ensemble:
    """N frozen experts and the trainable aggregators that fuse them.

    denoiser: the drop-in for a pipeline's denoiser. text_encoders: the drop-ins for its text encoders, in the
    pipeline's order; empty if the experts are bare denoisers. Made by from_experts or load.
    """

    def __init__(self, experts: Sequence[Expert], denoiser: EnsembleDenoiser, frame: Frame) -> None:
        self.experts = list(experts)
        self.denoiser = denoiser
        self.frame = frame
        slots = zip(*(expert.text_encoders for expert in experts), strict=True)
        self.text_encoders: list[EnsembleTextEncoder] = join_text_encoders(list(slots))
        _check_text_encoders(self)
        self.training: dict[str, Any] | None = None  # the recipe the aggregators were trained with, and what it measured

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[object],
        aggregator: str = "sabw",
        placement: str | Sequence[str] | None = None,
        *,
        aggregators: str | Path | None = None,
        attention_up_to: int | None = None,
        text_stream: str = "own",
        vae: str | None = None,
        tokenizer: str | None = None,
        scheduler: str | None = None,
        frame: str | None = None,
        dtype: torch.dtype | None = None,
        config: str | None = None,
        prediction_type: str | None = None,
        **aggregator_options: Any,
    ) -> "Ensemble":
        """Combine experts; untrained, their ensemble is the mean of their features.

        experts: strings (a diffusers folder, a .safetensors file, org/name@revision, demo:curves, name=… any of these,
        …+lora.safetensors),
        diffusers pipelines, or bare denoisers. aggregator, aggregator_options, attention_up_to, text_stream: see afa.aggregators.
        placement: layers, blocks, every-K, double, out, or stage names; default the family's. aggregators: a folder of trained ones,
        ours or the reference release's; then kind, options and placement come from there. frame: the folder of a pipeline for
        experts that are denoisers alone: its text encoders, tokenizers, scheduler and VAE; default the first expert that has them.
        vae, tokenizer, scheduler: an expert's name or a path, instead of the frame's. dtype: of the experts. config: of single
        files, found out by default. prediction_type: what U-Nets predict whose single files do not say it: epsilon or v_prediction.
        Raises UserError, with every reason, for experts that cannot be fused.
        """
        if not experts:
            raise UserError("an ensemble needs at least one expert")
        recipe = _recipe(aggregator, aggregator_options, attention_up_to, text_stream)
        frame, vae = (located(place) if isinstance(place, str) else place for place in (frame, vae))
        loaded = load_experts(experts, dtype, config, prediction_type)
        lender = lend(loaded, frame, dtype)
        _check(loaded, placement, aggregators)
        framed = Frame(loaded, vae=vae, tokenizer=tokenizer, scheduler=scheduler, config=config, lender=lender)
        return cls._combined(loaded, framed, recipe, placement, aggregators)

    def sharing(
        self,
        aggregator: str = "sabw",
        placement: str | Sequence[str] | None = None,
        *,
        aggregators: str | Path | None = None,
        attention_up_to: int | None = None,
        text_stream: str = "own",
        **aggregator_options: Any,
    ) -> "Ensemble":
        """Another ensemble of the very same experts and frame, which stay in memory once. Arguments: see from_experts."""
        recipe = _recipe(aggregator, aggregator_options, attention_up_to, text_stream)
        return self._combined(self.experts, self.frame, recipe, placement, aggregators)

    @classmethod
    def _combined(
        cls, experts: Sequence[Expert], frame: Frame, recipe: Recipe, placement: str | Sequence[str] | None, aggregators: str | Path | None
    ) -> "Ensemble":
        tensors = None
        if aggregators is not None:
            from afa.checkpoint.aggregators import fill, read_aggregators

            recipe, placement, tensors = read_aggregators(Path(aggregators), experts[0], len(experts))
        ensemble = cls(experts, _denoiser(experts, recipe, placement, frame), frame)
        if tensors is not None:
            fill(ensemble.denoiser.aggregators, tensors, Path(str(aggregators)))
        return ensemble

    @classmethod
    def load(
        cls,
        folder: str | Path,
        experts: Mapping[str, str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> "Ensemble":
        """Load what save wrote. experts: new places of experts that have moved, by name.

        verify: compare every expert file with its recorded sha256. Raises UserError naming the file and both hashes.
        """
        from afa.checkpoint.folder import load_ensemble

        return load_ensemble(cls, Path(located(str(folder))), experts or {}, dtype=dtype, verify=verify)

    def save(self, folder: str | Path, *, bundle: bool = False) -> None:
        """Write afa.json, aggregators.safetensors and a model card; experts are referred to by source and sha256.

        bundle: copy the experts in, so that the folder is complete. All or nothing is written.
        """
        from afa.checkpoint.folder import save_ensemble

        save_ensemble(self, Path(folder), bundle=bundle)

    def export_release(self, folder: str | Path) -> None:
        """Write the aggregators as the reference release does: aggregator_0 … aggregator_24. Raises UserError if they cannot be."""
        from afa.checkpoint.folder import export_release

        export_release(self, Path(folder))

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return self.denoiser.names

    @property
    def aggregators(self) -> nn.ModuleDict:
        """The trainable part, by stage name."""
        return self.denoiser.aggregators

    def to(self, *args: Any, **kwargs: Any) -> "Ensemble":
        """Move or cast everything, as nn.Module.to does."""
        self.denoiser.to(*args, **kwargs)
        for encoder in self.text_encoders:
            encoder.to(*args, **kwargs)
        return self

    def pipeline(self, pipeline_class: type | None = None, **components: Any) -> Any:
        """A stock diffusers pipeline whose denoiser and text encoders are the ensemble's.

        pipeline_class: default the text-to-image pipeline of the architecture; any other of the same components works
        (img2img, inpainting with 4 channels, ControlNet). components: replace or add, e.g. controlnet=….
        Raises UserError if the experts brought no text encoders or no VAE, and for a scheduler of another kind than predictions are converted to.
        """
        if components.get("scheduler") is not None:
            self._check_scheduler(components["scheduler"])
        pipe = self.frame.pipeline(self, pipeline_class, components)
        if all(any(part is mine for part in pipe.components.values()) for mine in (self.denoiser, *self.text_encoders)):
            equip(self, pipe)
        return pipe

    def load_lora(
        self, source: Any, experts: Sequence[str] | None = None, adapter_name: str | None = None, scale: float = 1.0, **options: Any
    ) -> str:
        """Load a LoRA beside the weights of all experts, or of some by name: -> the name it can be switched by.

        source: a file, or what else diffusers takes (with its options, e.g. weight_name=…). It is on, as strong as scale says; LoRAs
        that were loaded before are off there, as in a stock pipeline: pipe.set_adapters([one, other], [0.5, 1]) has both.
        Raises UserError for one that does not fit, with how many of its weights found no place.
        """
        return load_into(self, source, experts, adapter_name, scale, options)

    def _check_scheduler(self, scheduler: Any) -> None:
        found = next((found for found in self.denoiser.conversions if found is not None), None)
        if not self.denoiser.conversions and self.experts[0].scheduler is not None:
            _check_frame(self.experts[0], scheduler)
        if found is not None and conversion(Schedule.of(scheduler), found.frame) is not None:
            raise UserError(
                f"the scheduler is for models that predict {kind_of(scheduler)}, and the experts' predictions are made {found.frame.kind}, at the noise"
                " of the frame's scheduler; make the ensemble with scheduler=, an expert's name or a folder"
            )

    def attach(self, controlnet: nn.Module) -> nn.Module:
        """Let a ControlNet (or several in one MultiControlNetModel) see the first expert's text, as it was trained to.

        Done by pipeline(controlnet=…); call it yourself before AutoPipeline….from_pipe(pipe, controlnet=…).
        """
        nets = getattr(controlnet, "nets", [controlnet])
        for net in nets:
            net.register_forward_pre_hook(self.denoiser.narrow, with_kwargs=True)
        return controlnet


def _check(experts: Sequence[Expert], placement: str | Sequence[str] | None, aggregators: str | Path | None) -> None:
    """Refuse experts that cannot be fused, with every reason and how to see more. A folder's placement is not known yet."""
    try:
        reasons = mismatches(experts, features=aggregators is None and not only_predictions(placement, experts[0]))
        _refuse(experts, reasons)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _refuse(experts: Sequence[Expert], reasons: Sequence[str]) -> None:
    if reasons:
        compare = " ".join(str(expert.located.spec) if expert.located else expert.name for expert in experts)
        raise UserError("; ".join(reasons) + f". Compare them with: afa inspect {compare}")


def _check_text_encoders(ensemble: Ensemble) -> None:
    """Refuse text encoders of different weights where the family's pipelines cannot hand on what they say side by side."""
    if ensemble.denoiser.call.joined:
        return
    for index, name in enumerate(ensemble.names):
        unlike = [str(number) for number, encoder in enumerate(ensemble.text_encoders, start=1) if encoder.of_expert[index]]
        if unlike:
            raise UserError(
                f"'{name}' cannot join '{ensemble.names[0]}': it has text encoders of its own (number {', '.join(unlike)}), and experts of family"
                f" {ensemble.denoiser.family} must share theirs; give its denoiser alone (FOLDER/transformer), which then reads the first expert's"
            )


def _denoiser(experts: Sequence[Expert], recipe: Recipe, placement: str | Sequence[str] | None, frame: Frame) -> EnsembleDenoiser:
    """The drop-in denoiser of a family."""
    widths = [width_of(encoder) for encoder in experts[0].text_encoders]
    names, models = [expert.name for expert in experts], [expert.model for expert in experts]
    try:
        conversions = _conversions(experts, placement, frame)
        return DENOISERS[experts[0].family](models, names, recipe, placement, widths, conversions)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _conversions(experts: Sequence[Expert], placement: str | Sequence[str] | None, frame: Frame) -> list[Conversion | None]:
    """Where only predictions are combined, how every expert's become the frame's. Raises UserError where features are, of experts of other kinds."""
    if not only_predictions(placement, experts[0]):
        _refuse(experts, kind_mismatches(experts))
        if experts[0].scheduler is not None and frame.scheduler is not None:
            _check_frame(experts[0], frame.scheduler)
        return []
    if frame.scheduler is None:  # bare denoisers: nobody knows what they predict
        return []
    return [
        None
        if expert.scheduler is None or not scheduler_mismatches(frame.scheduler, expert.scheduler)
        else conversion(Schedule.of(expert.scheduler), Schedule.of(frame.scheduler))
        for expert in experts
    ]


def _check_frame(expert: Expert, scheduler: Any) -> None:
    """Raises UserError for a scheduler that would read what the experts predict as something else."""
    reasons = scheduler_mismatches(expert.scheduler, scheduler)
    if reasons:
        raise UserError(f"the scheduler does not fit the experts: {'; '.join(reasons)}; leave it out, or choose one that does with scheduler=")


def _recipe(aggregator: str, options: Mapping[str, Any], attention_up_to: int | None, text_stream: str) -> Recipe:
    try:
        return Recipe(aggregator, options, attention_up_to, text_stream)
    except ValueError as error:
        raise UserError(str(error)) from None
