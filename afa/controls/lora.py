"""LoRA on a U-Net: where it goes, how many parameters a rank has, and its file.

Source: Hu et al., arXiv:2106.09685, by way of peft. Deviation: besides the attention it adapts the feed-forward layers and
the convolutions of the residual blocks, so that it reaches all of the network, as aggregators at every stage do.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
PARTS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")  # ends of the adapted modules' names


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The modules of a U-Net that get a LoRA, by name; those that have one already count by the layer beneath."""
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")
        if isinstance(module, (nn.Linear, nn.Conv2d)) and any(name == part or name.endswith(f".{part}") for part in PARTS):
            yield name, module


def parameters_at_rank(model: nn.Module, rank: int) -> int:
    """How many parameters a LoRA of that rank trains on a U-Net that has none yet."""
    return rank * sum(_in_and_out(module) for _, module in adapted(model))


def matching_rank(model: nn.Module, parameters: int) -> int:
    """The smallest rank with at least that many trained parameters."""
    return max(1, math.ceil(parameters / parameters_at_rank(model, 1)))


def _in_and_out(module: nn.Linear | nn.Conv2d) -> int:
    """Parameters of one rank: down has the module's inputs (and its kernel), up its outputs."""
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    return module.in_channels * math.prod(module.kernel_size) + module.out_channels


def add_lora(model: nn.Module, rank: int) -> "LoraParameters":
    """Put a LoRA into a frozen U-Net, in float32; it changes nothing until it is trained. -> what is to be trained."""
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


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA in a U-Net in diffusers' own form, ready for its file: unet.….lora_A.weight, alpha equal to rank."""
    from peft import get_peft_model_state_dict

    found: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {f"unet.{name}": tensor.detach().contiguous().cpu() for name, tensor in found.items()}


def fuse_lora(model: Any, file: Path) -> None:
    """Add a LoRA file to a U-Net's own weights."""
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="unet")
    model.fuse_lora()
    model.unload_lora()
