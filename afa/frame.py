"""The frame of an ensemble: the one VAE, tokenizer and scheduler that serve all experts, and the stock pipeline around them."""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from afa.errors import UserError
from afa.experts.load import TEXT_ENCODERS, TOKENIZERS, Expert, load_vae
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.families.table import FAMILIES

if TYPE_CHECKING:
    from afa.ensemble import Ensemble

NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class Frame:
    """Which VAE, tokenizer and scheduler an ensemble uses: each an expert's name or a path, the first expert's by default.

    Raises UserError for a name that is neither.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        vae: str | None = None,
        tokenizer: str | None = None,
        scheduler: str | None = None,
        config: str | None = None,
    ) -> None:
        self.experts = list(experts)
        first = experts[0].name
        self.choice = {"vae": vae or first, "tokenizer": tokenizer or first, "scheduler": scheduler or first}
        self.config = config
        for part, choice in self.choice.items():
            if self._expert(choice) is None and not Path(choice).exists():
                names = ", ".join(expert.name for expert in experts)
                raise UserError(f"{part}='{choice}' is neither an expert's name ({names}) nor a folder or file here")

    def _expert(self, name: str) -> Expert | None:
        return next((expert for expert in self.experts if expert.name == name), None)

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The VAE, read when first asked for, in the experts' dtype."""
        expert = self._expert(self.choice["vae"])
        if expert is not None:
            return expert.load_vae()
        dtype = next(self.experts[0].model.parameters()).dtype
        return load_vae(locate(ExpertSpec("vae", self.choice["vae"])), self.config, dtype)

    @functools.cached_property
    def tokenizers(self) -> list[Any]:
        """One per text encoder."""
        return self._part("tokenizer", TOKENIZERS, "tokenizers")

    @functools.cached_property
    def scheduler(self) -> Any:
        """The scheduler; a pipeline gets its own copy."""
        return self._part("scheduler", ("scheduler",), "scheduler")

    def _part(self, part: str, names: Sequence[str], attribute: str) -> Any:
        expert = self._expert(self.choice[part])
        if expert is not None:
            return getattr(expert, attribute)
        from diffusers import SchedulerMixin
        from transformers import CLIPTokenizer

        folder = Path(self.choice[part])
        if part == "scheduler":
            from afa.schedulers import read_scheduler

            scheduler: SchedulerMixin = read_scheduler(folder)
            return scheduler
        found = [folder / name for name in names if (folder / name).is_dir()] or [folder]
        return [CLIPTokenizer.from_pretrained(path, local_files_only=True) for path in found]

    def pipeline(self, ensemble: "Ensemble", pipeline_class: type | None, components: dict[str, Any]) -> Any:
        """See Ensemble.pipeline."""
        import diffusers

        if not ensemble.text_encoders or self.scheduler is None:
            raise UserError(
                "the experts were given as bare denoisers, without text encoders and scheduler;"
                " give whole pipelines, or put ensemble.denoiser into your own"
            )
        family = FAMILIES[self.experts[0].family]
        chosen = pipeline_class or getattr(diffusers, family.call.pipeline(len(ensemble.text_encoders)))
        parts: dict[str, Any] = {
            family.component: ensemble.denoiser,
            **dict(zip(TEXT_ENCODERS, ensemble.text_encoders, strict=False)),
            **dict(zip(TOKENIZERS, self.tokenizers, strict=False)),
            "scheduler": type(self.scheduler).from_config(self.scheduler.config),
            **({} if "vae" in components else {"vae": self.vae}),
            **NO_SAFETY_CHECKER,
            **self.experts[0].pipeline_options,
        }
        taken = inspect.signature(chosen.__init__).parameters
        parts = {name: part for name, part in parts.items() if name in taken} | components
        if components.get("controlnet") is not None:
            ensemble.attach(components["controlnet"])
        pipe = chosen(**parts)
        pipe.save_pretrained = _refuse_saving  # before it has written half of it
        return pipe


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("a pipeline with an ensemble is not saved as a whole; save the ensemble with Ensemble.save(folder)")
