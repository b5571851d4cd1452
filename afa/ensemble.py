"""The ensemble: experts, their aggregators, and the frame (VAE, tokenizer, scheduler) they work in."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.aggregators.registry import Recipe
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.schedule import Conversion, Schedule, conversion, kind_of
from afa.errors import UserError
from afa.experts.compatible import kind_mismatches, mismatches, only_predictions, scheduler_mismatches
from afa.experts.donor import NO_DONOR, DonorSpec
from afa.experts.expert import Expert
from afa.experts.lending import borrow_components
from afa.experts.load import load_expert, load_experts
from afa.frame import Frame
from afa.lora_loading import equip, load_into
from afa.models.registry import FAMILIES
from afa.places import located
from afa.text_encoder import EnsembleTextEncoder, join_text_encoders, width_of


class Ensemble:
    """N frozen experts and the trainable aggregators that fuse them. Made by from_experts or load.

    experts:       the loaded experts, in order
    denoiser:      takes the place of the denoiser in a diffusers pipeline
    text_encoders: take the place of its text encoders, in order; empty if the experts are bare denoisers
    frame:         the VAE, the tokenizers and the scheduler that serve all experts
    training:      settings and measured result of the training; None if there was none
    """

    def __init__(self, experts: Sequence[Expert], denoiser: EnsembleDenoiser, frame: Frame) -> None:
        self.experts = list(experts)
        self.denoiser = denoiser
        self.frame = frame
        slots = zip(*(expert.text_encoders for expert in experts), strict=True)
        self.text_encoders: list[EnsembleTextEncoder] = join_text_encoders(list(slots))
        _check_text_encoders(self)
        self.training: dict[str, Any] | None = None

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
        text_encoders: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        config: str | None = None,
        prediction_type: str | None = None,
        **aggregator_options: Any,
    ) -> "Ensemble":
        """Combine experts. Before training, the ensemble is the mean of their features.

        experts:            strings, diffusers pipelines, or bare denoisers. A string is a diffusers folder, a
                            .safetensors file, org/name@revision or demo:curves; before it may stand a name
                            (name=…), after it LoRAs (…+lora.safetensors*0.8)
        aggregator:         sabw, stitch, mean or fixed; see afa.aggregators
        placement:          layers, blocks, every-K, double, out, or stage names; None: the family's default
        aggregators:        a folder of trained aggregators, ours or the reference release's; it then decides
                            aggregator, options and placement
        attention_up_to:    sabw: the largest side, in latent pixels, of maps with attention; None: all maps
        text_stream:        own or fused: text tokens in families whose blocks change them (SD 3, FLUX.1, …)
        vae:                an expert's name or a path (a folder, or a VAE's file), instead of the frame's VAE
        tokenizer:          the same for the tokenizer
        scheduler:          the same for the scheduler
        frame:              a pipeline's folder that gives text encoders, tokenizers, scheduler and VAE to
                            experts that are bare denoisers; with text_encoders also a hub id, of which
                            configs and tokenizers are downloaded; None: the first expert that has them
        text_encoders:      files or folders of text encoders for experts that are bare denoisers, in any
                            order: their tensors tell which they are; they go before those that lie in an
                            expert's own file beside the denoiser, and these before the frame's
        dtype:              of the experts; None: float32
        config:             of single files: sd15, sdxl, … or a folder; None: detected
        prediction_type:    epsilon or v_prediction, for U-Nets in single files that do not say it
        aggregator_options: hidden, heads, depth, … of the aggregator
        Returns the ensemble. Raises UserError, with every reason, for experts that cannot be fused.
        """
        if not experts:
            raise UserError("an ensemble needs at least one expert")
        recipe = _recipe(aggregator, aggregator_options, attention_up_to, text_stream)
        frame, vae = (located(place) if isinstance(place, str) else place for place in (frame, vae))
        lent = DonorSpec(frame, tuple(located(str(place)) for place in text_encoders), vae)
        loaded = load_experts(experts, dtype, config, prediction_type)
        donor = borrow_components(loaded, lent, dtype)
        _check(loaded, placement, aggregators)
        framed = Frame(loaded, vae=vae, tokenizer=tokenizer, scheduler=scheduler, config=config, donor=donor)
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
        """Make another ensemble of the same experts and frame, which stay in memory once.

        All arguments are those of from_experts. Returns the new ensemble.
        """
        recipe = _recipe(aggregator, aggregator_options, attention_up_to, text_stream)
        return self._combined(self.experts, self.frame, recipe, placement, aggregators)

    def beside(self, other: object) -> "Ensemble":
        """Make an ensemble of the same experts and one more model, last, in the same frame.

        other: as an expert of from_experts
        Only predictions are combined; all models stay in memory once.
        Returns the new ensemble. Raises UserError for a model that does not fit the experts.
        """
        added = dataclasses.replace(load_expert(other, self.experts[0].dtype, self.experts[0].config))
        while not added.name or added.name in self.names:
            added.name = f"{added.name or 'model'}-2"
        experts = [*self.experts, added]
        if not added.text_encoders:
            borrow_components(experts, NO_DONOR, self.experts[0].dtype)
        _check(experts, "out", None)
        return self._combined(experts, self.frame, Recipe("mean"), "out", None)

    @classmethod
    def _combined(
        cls,
        experts: Sequence[Expert],
        frame: Frame,
        recipe: Recipe,
        placement: str | Sequence[str] | None,
        aggregators: str | Path | None,
    ) -> "Ensemble":
        tensors = None
        if aggregators is not None:
            from afa.checkpoint.aggregator_files import fill, read_aggregators

            recipe, placement, tensors = read_aggregators(Path(aggregators), experts[0], len(experts))
        ensemble = cls(experts, _denoiser(experts, recipe, placement, frame), frame)
        if tensors is not None:
            fill(ensemble.denoiser.aggregators, tensors, Path(str(aggregators)))
        return ensemble

    @classmethod
    def load(
        cls,
        folder: str | Path,
        experts: Mapping[str, str] | Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        aggregators_dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> "Ensemble":
        """Load what save wrote.

        folder:            of the saved ensemble, or demo:ensemble
        experts:           name -> new place, of experts that have moved; or a list as --experts takes it:
                           "NAME=PLACE", and folders to search for them by sha256
        dtype:             of the experts; None: float32
        aggregators_dtype: of the aggregators' weights; None: as of the experts. To train them on, float32;
                           they compute in the experts' dtype all the same
        verify:            compare every file of every expert with its recorded sha256
        Returns the ensemble. Raises UserError that names the file and both hashes.
        """
        from afa.checkpoint.folder import load_ensemble

        place = Path(located(str(folder)))
        ensemble = load_ensemble(cls, place, experts or {}, dtype=dtype, verify=verify)
        ensemble.aggregators.to(aggregators_dtype or dtype or torch.float32)
        return ensemble

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        experts: Mapping[str, str] | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        aggregators_dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> "Ensemble":
        """Load an ensemble of the Hugging Face hub, or a folder as load does.

        source:           org/name, org/name@revision, or a folder
        revision:         branch, tag or commit; None: as in the source, or the default branch
        cache_dir:        of the download; None: the hub's own
        token:            of the hub; None: of `hf auth login` or HF_TOKEN
        local_files_only: use only what was downloaded before
        experts, dtype, aggregators_dtype, verify: see load
        Only the ensemble's own files are downloaded, and no code. Experts of the hub are downloaded as by
        from_experts.
        Returns the ensemble. Raises UserError.
        """
        from afa.checkpoint.hub import fetch_ensemble

        folder = fetch_ensemble(
            located(str(source)),
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return cls.load(folder, experts, dtype=dtype, aggregators_dtype=aggregators_dtype, verify=verify)

    def push_to_hub(
        self,
        repository: str,
        *,
        bundle: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,  # noqa: A002 (as the hub and the flag call it)
    ) -> str:
        """Upload the ensemble to the Hugging Face hub in one commit; an interrupted upload goes on.

        repository:     org/name, which is made if it is not there
        bundle:         upload the experts too; otherwise afa.json names them, by hub id or name, and sha256
        private:        whether a new repository is private; None: the account's default
        token:          of the hub; None: of `hf auth login` or HF_TOKEN
        revision:       a branch that is there; None: the default branch
        commit_message: None: "Upload an ensemble with afa"
        license:        for the card, such as apache-2.0; None: the experts' own, if all have the same
        Returns the URL of the commit. Raises UserError.
        """
        from afa.checkpoint.hub import push_ensemble

        where = {"private": private, "token": token, "revision": revision, "message": commit_message}
        return push_ensemble(self, repository, bundle=bundle, licence=license, **where)

    def save(self, folder: str | Path, *, bundle: bool = False) -> None:
        """Write afa.json, aggregators.safetensors and a model card. Everything is written, or nothing.

        folder: new, or of an ensemble, which is replaced
        bundle: copy the experts in; otherwise afa.json refers to them by source and sha256
        Raises UserError for a folder of a model, and (without bundle) for experts not loaded from files.
        """
        from afa.checkpoint.folder import save_ensemble

        save_ensemble(self, Path(folder), bundle=bundle)

    def export_release(self, folder: str | Path) -> None:
        """Write the aggregators in the format of the reference release: aggregator_0 … aggregator_24.

        folder: a new folder
        Raises UserError for aggregators that the format cannot hold.
        """
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
        """Make a stock diffusers pipeline that contains the ensemble's denoiser and text encoders.

        pipeline_class: any pipeline of the same components (img2img, inpainting with 4 channels, ControlNet);
                        None: the text-to-image pipeline of the architecture
        components:     components to replace or to add, such as controlnet=…
        Returns the pipeline. Raises UserError if the experts have no text encoders or no VAE, and for a
        scheduler that does not fit.
        """
        if components.get("scheduler") is not None:
            self._check_scheduler(components["scheduler"])
        pipe = self.frame.pipeline(self, pipeline_class, components)
        if all(
            any(part is mine for part in pipe.components.values())
            for mine in (self.denoiser, *self.text_encoders)
        ):
            equip(self, pipe)
        return pipe

    def load_lora(
        self,
        source: Any,
        experts: Sequence[str] | None = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> str:
        """Load a LoRA beside the weights of all experts, or of some.

        source:       a file, or anything else that diffusers' load_lora_weights takes
        experts:      names of the experts that get it; None: all
        adapter_name: None: a new name
        scale:        its strength
        options:      of diffusers, such as weight_name=…
        Returns the adapter's name. As in a stock pipeline, the LoRA is active, and those that were loaded
        before are not: pipe.set_adapters([one, other], [0.5, 1]) activates both.
        Raises UserError, with the number of weights that find no place.
        """
        return load_into(self, source, experts, adapter_name, scale, options)

    def _check_scheduler(self, scheduler: Any) -> None:
        found = next((found for found in self.denoiser.conversions if found is not None), None)
        if not self.denoiser.conversions and self.experts[0].scheduler is not None:
            _check_frame(self.experts[0], scheduler)
        if found is not None and conversion(Schedule.of(scheduler), found.frame) is not None:
            raise UserError(
                f"the scheduler is for models that predict {kind_of(scheduler)}, "
                "and the experts' predictions "
                f"are made {found.frame.kind}, at the noise of the frame's scheduler; "
                "make the ensemble with scheduler=, an expert's name or a folder"
            )

    def attach(self, controlnet: nn.Module) -> nn.Module:
        """Make a ControlNet read the first expert's prompt embeddings only; it was trained with one model.

        controlnet: a ControlNet, or a MultiControlNetModel
        Returns it. pipeline(controlnet=…) calls this method; call it yourself before
        AutoPipeline….from_pipe(pipe, controlnet=…).
        """
        nets = getattr(controlnet, "nets", [controlnet])
        for net in nets:
            net.register_forward_pre_hook(self.denoiser.first_expert_text, with_kwargs=True)
        return controlnet


def _check(
    experts: Sequence[Expert], placement: str | Sequence[str] | None, aggregators: str | Path | None
) -> None:
    """Raise UserError, with every reason, for experts that cannot be fused.

    aggregators: a folder of trained aggregators, whose placement is not known yet
    """
    try:
        reasons = mismatches(
            experts, features=aggregators is None and not only_predictions(placement, experts[0])
        )
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
    """Raise UserError for text encoders of different weights in a family that cannot join their states."""
    if ensemble.denoiser.interface.concat_text:
        return
    for index, name in enumerate(ensemble.names):
        unlike = [
            str(number)
            for number, encoder in enumerate(ensemble.text_encoders, start=1)
            if encoder.of_expert[index]
        ]
        if unlike:
            raise UserError(
                f"'{name}' cannot join '{ensemble.names[0]}': it has text encoders of its own "
                f"(number {', '.join(unlike)}), and experts of family {ensemble.denoiser.family} "
                "must share theirs; give its denoiser alone (FOLDER/transformer), "
                "which then reads the first expert's"
            )


def _denoiser(
    experts: Sequence[Expert], recipe: Recipe, placement: str | Sequence[str] | None, frame: Frame
) -> EnsembleDenoiser:
    """Make the drop-in denoiser of the experts' family."""
    widths = [width_of(encoder) for encoder in experts[0].text_encoders]
    names, models = [expert.name for expert in experts], [expert.model for expert in experts]
    try:
        conversions = _conversions(experts, placement, frame)
        made = FAMILIES[experts[0].family].denoiser(models, names, recipe, placement, widths, conversions)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    made.register_to_config(**experts[0].settings)
    return made


def _conversions(
    experts: Sequence[Expert], placement: str | Sequence[str] | None, frame: Frame
) -> list[Conversion | None]:
    """Return each expert's conversion to the frame's kind of prediction, if only predictions are combined.

    Returns an empty list if features are fused, or the kinds are unknown.
    Raises UserError if features are fused and the experts predict different kinds.
    """
    if not only_predictions(placement, experts[0]):
        _refuse(experts, kind_mismatches(experts))
        if experts[0].scheduler is not None and frame.scheduler is not None:
            _check_frame(experts[0], frame.scheduler)
        return []
    if frame.scheduler is None:  # bare denoisers: their kind of prediction is unknown
        return []
    return [
        None
        if expert.scheduler is None or not scheduler_mismatches(frame.scheduler, expert.scheduler)
        else conversion(Schedule.of(expert.scheduler), Schedule.of(frame.scheduler))
        for expert in experts
    ]


def _check_frame(expert: Expert, scheduler: Any) -> None:
    """Raise UserError for a scheduler of another kind of prediction or noise than the expert's."""
    reasons = scheduler_mismatches(expert.scheduler, scheduler)
    if reasons:
        raise UserError(
            f"the scheduler does not fit the experts: {'; '.join(reasons)}; "
            "leave it out, or choose one that does with scheduler="
        )


def _recipe(
    aggregator: str, options: Mapping[str, Any], attention_up_to: int | None, text_stream: str
) -> Recipe:
    try:
        return Recipe(aggregator, options, attention_up_to, text_stream)
    except ValueError as error:
        raise UserError(str(error)) from None
