"""LoRA on a denoiser of any family: where it goes, how many parameters a rank has, and its file.

Source: Hu et al., arXiv:2106.09685, by way of peft. Deviation: besides the attention it adapts the feed-forward layers and
the convolutions of residual blocks, so that it reaches all of the network, as aggregators at every stage do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from afa.families.stage import plain
from afa.families.table import FAMILIES, family_of

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
Layer = nn.Linear | nn.Conv2d


def adapted(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The modules of a denoiser that get a LoRA, by name: of its stages, what attends, feeds forward, or convolves in residual blocks.

    What has no say in the prediction gets none. Those that have a LoRA already count by the layer beneath.
    """
    stages = FAMILIES[family_of(model)].stages(model)
    chosen = {id(plain(layer)) for stage in stages for part in _inside(stage.modules()) for layer in _layers(part)}
    chosen -= {id(layer) for stage in stages for layer in _inside(stage.unheard())}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")
        if isinstance(module, Layer) and id(module) in chosen and "lora_" not in path:
            yield name, module


def _inside(modules: Iterable[object]) -> Iterator[nn.Module]:
    """Some modules and all that they are made of."""
    return (part for module in modules if isinstance(module, nn.Module) for part in module.modules())


def _layers(part: nn.Module) -> list[nn.Module]:
    """What is adapted of one module of a denoiser: all or some of its layers, nothing of other kinds of modules."""
    if hasattr(part, "to_q") or isinstance(part, FeedForward):
        return [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
    if isinstance(part, ResnetBlock2D):
        return [part.conv1, part.conv2]
    if hasattr(part, "proj_mlp"):  # feeds forward beside its attention, as FLUX's single blocks do
        return [part.proj_mlp, part.proj_out]
    return []


def parameters_at_rank(model: nn.Module, rank: int) -> int:
    """How many parameters a LoRA of that rank trains on a denoiser that has none yet."""
    return rank * sum(_in_and_out(module) for _, module in adapted(model))


def matching_rank(model: nn.Module, parameters: int) -> int:
    """The smallest rank with at least that many trained parameters."""
    return max(1, math.ceil(parameters / parameters_at_rank(model, 1)))


def _in_and_out(module: Layer) -> int:
    """Parameters of one rank: down has the module's inputs (and its kernel), up its outputs."""
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    return module.in_channels * math.prod(module.kernel_size) + module.out_channels


def add_lora(model: nn.Module, rank: int) -> "LoraParameters":
    """Put a LoRA into a frozen denoiser, in float32; it changes nothing until it is trained. -> what is to be trained."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name for name, _ in adapted(model)], init_lora_weights=True)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return LoraParameters(parameters)


class LoraParameters(nn.Module):
    """The parameters of a LoRA, wherever in a model they lie, as a module of their own."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", ":"), parameter)  # module names may hold no dots


def component_of(model: nn.Module) -> str:
    """What a pipeline calls a denoiser of this kind."""
    return FAMILIES[family_of(model)].component


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA in a denoiser in diffusers' own form, ready for its file: unet.… or transformer.….lora_A.weight, alpha equal to rank."""
    from peft import get_peft_model_state_dict

    found: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {f"{component_of(model)}.{name}": tensor.detach().contiguous().cpu() for name, tensor in found.items()}


def fuse_lora(model: Any, file: Path) -> None:
    """Add a LoRA file to a denoiser's own weights."""
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=component_of(model))
    model.fuse_lora()
    model.unload_lora()
