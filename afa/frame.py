"""The frame of an ensemble: the VAE, tokenizers and scheduler that all experts share; and stock pipelines."""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from afa.errors import UserError
from afa.experts.donor import lacks
from afa.experts.expert import SETTINGS, TEXT_ENCODERS, TOKENIZERS, Expert
from afa.experts.locate import locate
from afa.experts.parts import PROCESSOR, load_tokenizer
from afa.experts.spec import ExpertSpec
from afa.experts.vae import load_vae
from afa.models.registry import FAMILIES

if TYPE_CHECKING:
    from afa.ensemble import Ensemble

NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
# arguments that some pipelines do not take
OPTIONAL = (*NO_SAFETY_CHECKER, *TEXT_ENCODERS, *TOKENIZERS, *SETTINGS)


class Frame:
    """The VAE, tokenizers and scheduler of an ensemble, which are loaded when they are first used.

    experts:   of the ensemble
    vae:       name of an expert or a path; None: the donor's, or else the first whole pipeline's
    tokenizer: the same for the tokenizers
    scheduler: the same for the scheduler
    config:    of a VAE that is a single file
    donor:     a pipeline that gives components to experts which are denoisers alone; None: none is needed
    Raises UserError for a text that is neither an expert's name nor a path.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        vae: str | None = None,
        tokenizer: str | None = None,
        scheduler: str | None = None,
        config: str | None = None,
        donor: Expert | None = None,
    ) -> None:
        self.experts = list(experts)
        self.donor = None if donor is None or any(donor is expert for expert in experts) else donor
        whole = donor or next((expert for expert in experts if expert.text_encoders), experts[0])
        if vae is None and not whole.has_vae:  # a donor may lack one that an expert has
            vae = next((expert.name for expert in experts if expert.has_vae), None)
        self.choice = {
            part: chosen or whole.name
            for part, chosen in (("vae", vae), ("tokenizer", tokenizer), ("scheduler", scheduler))
        }
        if scheduler is None and self.donor is not None and experts[0].scheduler is not self.donor.scheduler:
            self.choice["scheduler"] = experts[0].name  # changed to what the expert's own file says
        self.config = config
        for part, choice in self.choice.items():
            if self._expert(choice) is None and not Path(choice).exists():
                names = ", ".join(expert.name for expert in experts)
                raise UserError(
                    f"{part}='{choice}' is neither an expert's name ({names}) nor a folder or file here"
                )

    def _expert(self, name: str) -> Expert | None:
        known = [*self.experts, *([self.donor] if self.donor else [])]
        return next((expert for expert in known if expert.name == name), None)

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The VAE, in the experts' dtype."""
        expert = self._expert(self.choice["vae"])
        if expert is not None:
            return expert.load_vae()
        return load_vae(
            locate(ExpertSpec("vae", self.choice["vae"])),
            self.config,
            self.experts[0].dtype,
            like=self.experts[0],
        )

    @functools.cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, one per text encoder."""
        return self._part("tokenizer", (*TOKENIZERS, PROCESSOR), "tokenizers")

    @functools.cached_property
    def scheduler(self) -> Any:
        """The scheduler; a pipeline gets its own copy."""
        return self._part("scheduler", ("scheduler",), "scheduler")

    def _part(self, part: str, names: Sequence[str], attribute: str) -> Any:
        expert = self._expert(self.choice[part])
        if expert is not None:
            return getattr(expert, attribute)
        folder = Path(self.choice[part])
        if part == "scheduler":
            from afa.schedulers import read_scheduler

            return read_scheduler(folder)
        return [
            load_tokenizer(path)
            for path in [folder / name for name in names if (folder / name).is_dir()] or [folder]
        ]

    def pipeline(self, ensemble: "Ensemble", pipeline_class: type | None, components: dict[str, Any]) -> Any:
        """Make the stock pipeline around an ensemble. See Ensemble.pipeline for the arguments."""
        import diffusers

        if not ensemble.text_encoders or self.scheduler is None:
            raise UserError(
                f"the experts are bare denoisers: {lacks(self.experts[0])}; or add an expert that is a whole "
                "pipeline, or put ensemble.denoiser into a pipeline of your own"
            )
        first = self.experts[0]
        family = FAMILIES[first.family]
        chosen = pipeline_class or getattr(
            diffusers, family.interface.pipeline_name(len(ensemble.text_encoders), first.model.config)
        )
        if pipeline_class is None and "vae" not in components:
            _check_channels(first, self.vae)
        parts: dict[str, Any] = {
            family.component: ensemble.denoiser,
            **_named(ensemble.text_encoders, self.tokenizers),
            "scheduler": type(self.scheduler).from_config(self.scheduler.config),
            **({} if "vae" in components else {"vae": self.vae}),
            **first.pipeline_options,
        }
        if components.get("controlnet") is not None:
            ensemble.attach(components["controlnet"])
        pipe = _made(chosen, parts | components)
        pipe.save_pretrained = _refuse_saving  # the stock method would fail after writing half of it
        return pipe


def stock_pipeline(expert: Expert) -> Any:
    """Make the stock pipeline of one expert from its own parts. Raises UserError if it has no VAE."""
    import diffusers

    family = FAMILIES[expert.family]
    parts = {
        family.component: expert.model,
        "vae": expert.load_vae(),
        "scheduler": expert.scheduler,
        **expert.pipeline_options,
    }
    name = family.interface.pipeline_name(len(expert.text_encoders), expert.model.config)
    chosen = getattr(diffusers, name)
    return _made(chosen, parts | _named(expert.text_encoders, expert.tokenizers))


def _named(text_encoders: Sequence[Any], tokenizers: Sequence[Any]) -> dict[str, Any]:
    """Text encoders and tokenizers by their names in a pipeline."""
    return dict(zip(TEXT_ENCODERS, text_encoders, strict=False)) | dict(
        zip(TOKENIZERS, tokenizers, strict=False)
    )


def _made(chosen: type, parts: dict[str, Any]) -> Any:
    """Make a pipeline. Missing text encoders are None; optional parts that it does not take are dropped."""
    taken = inspect.signature(chosen.__init__).parameters
    if PROCESSOR in taken and parts.get(PROCESSOR) is None:
        from afa.experts.text_processor import TextProcessor

        parts = {**parts, PROCESSOR: TextProcessor(parts[TOKENIZERS[0]])}
    absent = {name: None for name in (*TEXT_ENCODERS, *TOKENIZERS) if name in taken and name not in parts}
    given = {
        name: part
        for name, part in (NO_SAFETY_CHECKER | parts).items()
        if name in taken or name not in OPTIONAL
    }
    return chosen(**absent, **given)


def _check_channels(expert: Expert, vae: Any) -> None:
    """Raise UserError for a denoiser with other inputs than noisy latents; text-to-image cannot run it."""
    expected = vae.config.get("latent_channels", vae.config.get("z_dim"))
    found = FAMILIES[expert.family].interface.latent_channels(expert.model.config)
    if expected is not None and found != expected:
        raise UserError(
            f"'{expert.name}' takes {found} latent channels and its VAE has {expected}: "
            "it is made for filling in or editing; "
            "say which pipeline with pipeline(diffusers.FluxFillPipeline) or the like"
        )


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "a pipeline with an ensemble is not saved as a whole; save the ensemble with Ensemble.save(folder)"
    )
