"""How a network of ComfyUI is read as stages: what a family's file defines, and the registry of families."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.lazy import load
from afa.stages.stage import Stage, StageContext

Call = Mapping[str, Any]  # arguments of a network's forward, by name
Options = dict[str, Any]  # ComfyUI's transformer_options

# class of ComfyUI's network -> "module:reader"
READERS = {
    "UNetModel": "afa.comfyui.unet:UNetReader",
    "Flux": "afa.comfyui.flux:FluxReader",
    "Chroma": "afa.comfyui.chroma:ChromaReader",
    "OpenAISignatureMMDITWrapper": "afa.comfyui.sd3:SD3Reader",
}
SERVED = "Stable Diffusion 1.x and 2.x, SDXL (UNetModel), 3 and 3.5 (MMDiT), FLUX.1 (Flux), Chroma"


class NetworkReader(ABC):
    """Reads the networks of one class as stages, and does what their forward does before and after.

    family:  of the ensembles that it serves, as in their manifest
    wrapped: ComfyUI runs wrappers of the network around its forward
    """

    family: ClassVar[str]
    wrapped: ClassVar[bool] = True

    @abstractmethod
    def stages(self, network: Any) -> tuple[Stage, ...]:
        """Read a network as stages. Raises UserError for one with parts that are not supported."""

    @abstractmethod
    def widths(self, network: Any) -> tuple[int, int, int]:
        """Return the widths of time embedding and text as aggregators see them, and of the input text."""

    @abstractmethod
    def begin(self, network: Any, call: Call, options: Options) -> tuple[Tensor, StageContext]:
        """Do what the forward does before the first block.

        call:    arguments of the forward, with the text of this expert
        options: of this expert
        Returns the input of the first stage, (B, C, H, W), and the context.
        Raises UserError for arguments that an ensemble cannot use.
        """

    @abstractmethod
    def control(self, stages: Sequence[Stage], call: Call) -> PassOptions:
        """Return the residuals of ControlNets by stage. Raises UserError if they do not fit."""

    @abstractmethod
    def end(self, prediction: Tensor, call: Call) -> Tensor:
        """Return what the forward returns for the output of the last stage."""


def reader_of(network: Any, where: str) -> NetworkReader:
    """Return what reads a network of ComfyUI.

    where: the input that the network is from, for the message
    Raises UserError for a class that is not served.
    """
    kind = type(network).__name__
    if kind not in READERS:
        raise UserError(
            f"{where} is a {kind}, and ensembles of it do not run in ComfyUI; served are {SERVED}"
        )
    reader: NetworkReader = load(READERS[kind])()
    return reader


def from_its_module(network: Any, name: str) -> Callable[..., Any]:
    """Return a function of the module that defines a network's class: that of the ComfyUI which runs."""
    found: Callable[..., Any] = vars(sys.modules[type(network).__module__])[name]
    return found
