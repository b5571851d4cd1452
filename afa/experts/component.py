"""One component of an expert, described by its files: its class, its settings, the headers of its weights.

`model` is what the files describe, on the meta device; `load` is the same model with its weights. Both are
made from the same class, settings and names, and checked alike: a command that only describes a component and
one that computes with it cannot differ.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin, no_init_weights
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.folders import read_folder
from afa.experts.headers import Tensors, check_fit, dtype_of, read_file, same_bytes
from afa.experts.layouts import Layout
from afa.experts.parts import check_config, component_class, component_named, first_line
from afa.experts.prediction import is_prediction_key
from afa.experts.tensors import TensorReader
from afa.text_encoder import arithmetic


@dataclass(frozen=True, eq=False)
class Component:
    """A denoiser, a text encoder or a VAE, before its weights are read.

    name:     its name in a pipeline: unet, transformer, text_encoder, vae …
    kind:     its class, of diffusers or transformers
    settings: the content of its config.json
    config:   the folder with its config.json
    weights:  the folder or the single file with its weights; None: a config without weights
    layout:   how a single file names the tensors; None: as the installed libraries do
    change:   changes a new model, such as one whose file leaves a part out; None: it stays as it is
    """

    name: str
    kind: Any
    settings: Mapping[str, Any]
    config: Path
    weights: Path | None = None
    layout: Layout | None = None
    change: Callable[[nn.Module], None] | None = None

    @classmethod
    def read(
        cls,
        config: Path,
        name: str | None,
        library: str,
        class_name: str,
        weights: Path,
        layout: Layout | None = None,
    ) -> "Component":
        """Read the settings of a component.

        name:                None: of a denoiser alone, which its class names
        library, class_name: as model_index.json has them
        Raises UserError for a class that is not the library's own, and for settings that are broken.
        """
        kind = component_class(config, name, library, class_name)
        settings = check_config(config, library, class_name)
        return cls(name or component_named(config, class_name), kind, settings, config, weights, layout)

    @property
    def where(self) -> str:
        """What error messages call it."""
        if self.layout is None:
            return str(self.weights or self.config)
        config = f" (read with the config {self.config.parent.name})" if self.config.name == self.name else ""
        return f"the {self.name} in {self.weights}{config}"

    @cached_property
    def tensors(self) -> Tensors:
        """The headers of its tensors, by their names in the files.

        Raises UserError if a file is missing, broken, cut off, pickled or quantised.
        """
        if self.weights is None:
            return {}
        if self.layout is None:
            return read_folder(self.weights)
        found = (
            read_folder(self.weights)
            if self.weights.is_dir()
            else read_file(self.weights, self.layout.prefix)
        )
        return {
            name: entry
            for name, entry in found.items()
            if name.startswith(self.layout.prefix) and not is_prediction_key(name)
        }

    @property
    def dtype(self) -> str | None:
        """The dtype in its files; None if there are none."""
        return dtype_of(self.tensors)

    @cached_property
    def model(self) -> nn.Module:
        """The component on the meta device.

        Raises UserError for settings that make no model, and for files that lack one of its weights.
        """
        with torch.device("meta"), no_init_weights():
            model = self.make()
        if self.weights is not None:
            self._fitting(model, {name: entry.meta() for name, entry in self.tensors.items()})
        return model

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The component with its weights, in evaluation mode.

        dtype: of the weights; those that its class keeps in float32 stay so
        Raises UserError as `model` does.
        """
        # buffers that no file holds are computed, by transformers in the dtype of the weights
        computed = dtype if self._of_transformers else None
        with init_empty_weights(), _no_init_weights(), _default_dtype(computed):
            model = self.make()
        _tie(model)
        # What is computed from a few bits stays in float32 where its dtype here is not known yet.
        early = None if _kept_in_float32(model, dtype) else dtype
        with TensorReader() as reader:
            found = self._fitting(
                model,
                {
                    name: reader.tensor(entry).to(early if entry.undone else None)
                    for name, entry in self.tensors.items()
                },
            )
        # Copied: at the odd addresses of a memory-mapped file, some kernels round the last bits otherwise.
        # One after the other, so that two copies of all weights are never in memory.
        state = {}
        for name in list(found):
            tensor = found.pop(name)
            kind = _dtype_of_weight(model, name, dtype) if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(kind, copy=True)
        model.load_state_dict(state, strict=False, assign=True)
        _tie(model)
        return model

    def make(self) -> nn.Module:
        """A new model of its class and settings, without its weights. Raises UserError if they make none."""
        try:
            if self._of_transformers:
                config_class = self.kind.config_class
                own = self.settings.get(config_class.base_config_key)  # one part of a larger model's settings
                model: nn.Module = self.kind(config_class.from_dict(dict(own or self.settings)))
            else:
                model = self.kind.from_config(dict(self.settings))
        except Exception as error:  # the libraries raise anything for settings of a wrong type
            raise UserError(
                f"{self.config / 'config.json'} makes no {self.kind.__name__}: {first_line(error)}"
            ) from None
        if self.change is not None:
            self.change(model)
        return model.eval()

    @property
    def _of_transformers(self) -> bool:
        """Whether its class is of transformers, and not of diffusers."""
        return hasattr(self.kind, "config_class")

    def same_as(self, other: "Component") -> bool:
        """Whether two components compute the same: equal files, bit for bit, and equal settings.

        Files are read until their first difference.
        """
        if self.name != other.name or self.kind is not other.kind:
            return False
        alike = self.settings == other.settings and self.change is other.change is None
        alike = alike or arithmetic(self.model) == arithmetic(other.model)  # which makes both models
        return alike and same_bytes(self.tensors, other.tensors)

    def _fitting(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of its files by the names in the model's state. Raises UserError if any are missing."""
        if self.layout is not None:
            try:
                tensors = self.layout.to_diffusers(model, tensors)
            except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not all(one.is_meta for one in tensors.values()):
                    _ = self.model  # raises if it is about shapes, as tensors without content show
                    raise
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{self.where} is incomplete or of another architecture ({reason}); "
                    "download or export it again"
                ) from None
        return check_fit(model, tensors, self.where)


@contextmanager
def _no_init_weights() -> Iterator[None]:
    """Make models of diffusers and of transformers without drawing their first weights."""
    from transformers.initialization import no_init_weights as of_transformers

    with of_transformers(), no_init_weights():
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Make new tensors in this dtype; None: in the usual one."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _tie(model: Any) -> None:
    """Make weights that a class of transformers shares between layers one parameter again."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def _dtype_of_weight(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one weight."""
    return torch.float32 if _kept_in_float32(model, dtype) & set(name.split(".")) else dtype


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """The modules that stay in float32, by the rules of transformers and diffusers."""
    always = dtype == torch.float16 or isinstance(model, ModelMixin)  # transformers: in float16 only
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if always else set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept
