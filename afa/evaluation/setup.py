"""What all rows of a comparison share: protocol, experts (loaded once), training settings, folders."""

import dataclasses
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.checkpoint.sources import find_experts
from afa.data.registry import open_source
from afa.data.sources import Columns
from afa.devices import process_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.axes import find_axes
from afa.evaluation.protocols import Protocol, ProtocolOptions, make_protocol
from afa.evaluation.recorded import print_recorded, recorded_data, recorded_settings
from afa.evaluation.settings import EvaluateSettings
from afa.experts.description import denoiser_config
from afa.experts.expert import Expert
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.files import settled
from afa.fingerprint import begun_with
from afa.models.registry import FAMILIES
from afa.prompts import warn_of_prompts
from afa.sampling.sample import Sampling, image_size
from afa.schedulers import reschedule
from afa.schema import shown
from afa.seeds import nth_seed
from afa.training.objective_registry import OBJECTIVES, PLAIN
from afa.training.settings import TrainSettings

TRAINING_DATA = "training-data"  # inside the output, where a protocol draws its own


class Setup:
    """The shared parts of one comparison. Raises UserError for what cannot be compared.

    axes:    settings of sampling with several values; the protocol has the start of each
    ranking: the experts' names from best to worst, without looking at judged images (see tuning.py)
    """

    def __init__(self, settings: EvaluateSettings) -> None:
        self.settings = settings
        self.output = Path(settings.output)
        self.folder = Path(settings.ensemble)
        self.manifest = read_manifest(self.folder)
        self.device = process_device(settings.device)
        self.moved = settings.experts or []
        data = None if settings.protocol_data is None else Path(settings.protocol_data)
        names = [field.name for field in dataclasses.fields(ProtocolOptions) if field.name != "data"]
        one = {name: None if settings.several(name) else getattr(settings, name) for name in names}
        given = ProtocolOptions(**one, data=data)
        protocol = self._with_guidance(make_protocol(settings.protocol, given))
        self.axes = find_axes(settings, protocol.sampling, begun_with(self.output))
        start: dict[str, Any] = {axis.name: axis.start for axis in self.axes}
        sampling = dataclasses.replace(protocol.sampling, **start)
        self.protocol: Protocol = dataclasses.replace(protocol, sampling=sampling)
        self.ranking: tuple[str, ...] = self.names

    def _with_guidance(self, protocol: Protocol) -> Protocol:
        """Return the protocol, with the family's guidance if it has none of its own.

        Raises UserError for guidance that the family does not have.
        """
        sampling, given = protocol.sampling, self.settings.several("guidance")
        if sampling.guidance is None or sampling.true_guidance is not None:
            config, interface = self._config, FAMILIES[self.manifest.family].interface
            for value in given or [sampling.guidance]:
                interface.pipeline_guidance(
                    config, 1, value, sampling.negative_prompt, sampling.true_guidance
                )
            guidance = interface.default_guidance(config) if sampling.guidance is None else sampling.guidance
            protocol = dataclasses.replace(
                protocol, sampling=dataclasses.replace(sampling, guidance=guidance)
            )
        return protocol

    @cached_property
    def _config(self) -> Any:
        """The first expert's denoiser's config, without its weights."""
        entry = self.manifest.experts[0]
        spec = find_experts(self.manifest, self.folder, self.moved)[0]
        return denoiser_config(locate(spec), self.manifest.family, entry.config_in(self.folder))

    def check_guided(self) -> None:
        """Raise UserError unless one pass makes both predictions of guidance."""
        reason = FAMILIES[self.manifest.family].interface.why_no_batched_guidance(self._config)
        most = max(self.settings.several("guidance"), default=self.sampling.guidance or 1)
        if not reason and most <= 1:
            reason = f"guidance {most:g} makes one prediction"
        if reason:
            raise UserError(f"it needs both predictions of guidance in one pass, and {reason}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.manifest.experts)

    @property
    def sampling(self) -> Sampling:
        return self.protocol.sampling

    @cached_property
    def dtype(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.settings.dtype)
        return kind

    @cached_property
    def ensemble(self) -> Ensemble:
        """Return the ensemble with its experts loaded, and with the protocol's scheduler if it has one."""
        ensemble = Ensemble.load(self.folder, self.moved, dtype=self.dtype).to(self.device)
        if self.protocol.scheduler is not None:
            reschedule(ensemble, self.protocol.scheduler)
        if PartialState().is_main_process:
            captions = list(dict.fromkeys(item.caption for item in self.protocol.items))
            warn_of_prompts(captions, ensemble.denoiser.interface, ensemble.frame.tokenizers)
        return ensemble

    def expert(self, name: str) -> Expert:
        """Return an expert of the ensemble."""
        return self.ensemble.experts[self.names.index(name)]

    @cached_property
    def base(self) -> Expert:
        """Return the model that the experts were fine-tuned from. Raises UserError if it is not given."""
        if self.settings.base is None:
            raise UserError("it needs the model the experts were tuned from; give it with --base")
        loaded = load_expert(self.settings.base, self.dtype, self.ensemble.experts[0].config)
        for module in (loaded.model, *loaded.text_encoders):
            module.to(self.device)
        return loaded

    def size(self) -> tuple[int, int]:
        """Return height and width of the images, in pixels."""
        return image_size(self.pipeline(self.ensemble), self.sampling)

    def expert_specs(self) -> list[str]:
        """Return the experts' specs, as `afa train` takes them."""
        return [str(spec) for spec in find_experts(self.manifest, self.folder, self.moved)]

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """Return the ensemble's recorded training options.

        Raises UserError if it was not trained by `afa train`.
        """
        found = recorded_settings(self.manifest, self.folder)
        if PartialState().is_main_process:
            print_recorded(self.manifest, self.folder)
        return found

    def training(self, output: Path, run: int, **changes: Any) -> TrainSettings:
        """Return the ensemble's training settings with its seed + run.

        Raises UserError if none are recorded, or they need a reward that is not given.
        """
        fixed: dict[str, Any] = {
            "experts": self.expert_specs(),
            "output": str(output),
            "device": self.settings.device,
        }
        fixed["allow_outside"] = self.settings.allow_outside
        objective = str(changes.get("objective", self.recorded.get("objective", PLAIN)))
        known = [OBJECTIVES[name] for name in objective.split("+") if name in OBJECTIVES]
        if any(entry.rewarded for entry in known) and "reward" not in changes:
            if self.settings.reward is None:
                raise UserError(
                    f"{self.folder / MANIFEST} records training by {objective}, "
                    "and a file may not name a reward; give it with --reward,"
                    " a name or your own Python file"
                )
            fixed |= {"reward": self.settings.reward, "reward_weights": self.settings.reward_weights}
        recorded = TrainSettings.current()(**{**self.recorded, **fixed, "data": self.training_data})
        if "aggregator" in changes:
            changes = recorded.other_aggregator(changes["aggregator"]) | changes
        return dataclasses.replace(recorded, **{"seed": nth_seed(recorded.seed, run), **changes})

    @cached_property
    def training_data(self) -> str:
        """Return the place of the training images: given, drawn as recorded, or drawn by the protocol.

        A place that a manifest names is not read, since it may come from a stranger. Raises UserError if
        there is none.
        """
        given = self.settings.train_data or recorded_data(self.manifest)
        if given is not None:
            return given
        drawn = self.output / TRAINING_DATA
        if self.protocol.training is not None and not (settled(drawn) / "metadata.jsonl").exists():
            self.protocol.training(drawn)
        if not drawn.is_dir():
            recorded = shown((self.manifest.training or {}).get("settings", {}).get("data"))
            raise UserError(
                f"{self.folder / MANIFEST} names its training data as {recorded}, "
                "and a place is not taken from a file; give it with --train-data"
            )
        return str(drawn)

    def tuning_captions(self) -> list[str]:
        """Return captions for choosing options: the protocol's, else those of the training data."""
        captions = list(self.protocol.tuning)
        try:
            if not captions:
                columns = Columns(allow_outside=self.settings.allow_outside)
                captions = [sample.caption for sample in open_source(self.training_data, columns).samples]
        except UserError as error:
            if PartialState().is_main_process:
                print(
                    "afa: rivals keep their default options, since there are no captions to choose them on: "
                    f"{error}",
                    file=sys.stderr,
                )
        return captions[: self.settings.tuning]

    def pipeline(self, ensemble: Ensemble) -> Any:
        """Return a stock pipeline with the ensemble's VAE and scheduler, for any denoiser."""
        scheduler = self.ensemble.frame.scheduler
        pipe = ensemble.pipeline(
            vae=self.ensemble.frame.vae, scheduler=type(scheduler).from_config(scheduler.config)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)
