"""What an ensemble costs over its experts: time and memory of a denoising step, time of a training step.

    python benchmarks/step.py --config sd15 --experts 3 --size 512 --batch 2
    python benchmarks/step.py --config demo:base/unet --repeats 5

Random weights: the cost does not depend on them. Every round runs the experts one after another and then the ensemble, so
that a drift of the machine meets both; ratios are taken within a round. Given are the median, the smallest and the
largest of n rounds. Target: on a CPU, SD 1.5 at 512 px, batch 2, three experts, the ensemble takes at most 1.20 times as
long as its experts and at most 1 GB more memory, aggregators included.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from timing import Clock, Spread, Work, peak_memory, rounds
from torch import Tensor, nn

from afa.aggregators.registry import Recipe, count_parameters
from afa.cli.flags import add_flags, read_flags
from afa.errors import UserError
from afa.experts.single_file import KNOWN_CONFIGS, config_folder
from afa.models.unet import UNetEnsemble, widths
from afa.places import located
from afa.settings import option

SMALL = 50_000_000  # parameters an expert up to which a training step is always measured
TOKENS = 77  # of CLIP's prompts
PIXELS = 8  # a side, for one of the latent's


@dataclass(frozen=True)
class Options:
    """One measurement, field by field a flag."""

    config: str = option(
        "sd15",
        help=f"{', '.join(KNOWN_CONFIGS)}, or a folder with a diffusers U-Net's config.json, such as demo:base/unet",
    )
    experts: int = option(3, help="how many experts")
    size: int | None = option(
        None, help="side of the image in pixels, eight for one of the latent's (default: the model's own)"
    )
    batch: int = option(2, help="of the U-Net; guidance makes 2 of one image")
    dtype: str = option(
        "float32", help="of the experts; aggregators are float32", choices=["float32", "bfloat16", "float16"]
    )
    placement: str = option("layers", help="fused stages: layers, blocks, out, or names such as M00,OUT11")
    hidden: int = option(128, help="width inside the aggregators")
    heads: int = option(8, help="attention heads of the aggregators")
    depth: int = option(2, help="transformer layers of the aggregators")
    attention_up_to: int | None = option(
        None, help="build the transformer only on maps up to this side in latent pixels"
    )
    repeats: int = option(3, help="rounds")
    train: bool = option(False, help="measure a training step too, as is always done for small models")
    gradient_checkpointing: bool = option(False, help="in the training step, of experts and ensemble alike")
    device: str = option("cpu", help="where", choices=["cpu", "cuda"])
    json: bool = option(False, help="print JSON")

    def __post_init__(self) -> None:
        for name in ("experts", "batch", "hidden", "heads", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.size is not None and (self.size < PIXELS or self.size % PIXELS):
            raise UserError(f"--size {self.size} must be a multiple of {PIXELS} pixels")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda is not available here; use --device cpu")


def make_experts(options: Options, device: str | None = None) -> list[UNet2DConditionModel]:
    """Experts of one config with random weights, made in their dtype. Raises UserError if there is no such config."""
    place = Path(located(options.config))
    folder = place if (place / "config.json").is_file() else config_folder(options.config) / "unet"
    config = UNet2DConditionModel.load_config(folder)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        made = [
            UNet2DConditionModel.from_config(config).to(device or options.device)
            for _ in range(options.experts)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    return [expert.eval().requires_grad_(False) for expert in made]


def make_call(unet: Any, options: Options) -> dict[str, Any]:
    """What a pipeline hands to a U-Net at one step."""
    config, batch = unet.config, options.batch
    side = options.size // PIXELS if options.size else config.sample_size
    like = {"dtype": getattr(torch, options.dtype), "device": options.device}
    call: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, side, side, **like),
        "timestep": torch.tensor(500, device=options.device),
        "encoder_hidden_states": torch.randn(batch, TOKENS, widths(unet)[1], **like),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **like),
            "time_ids": torch.ones(batch, 6, **like),
        }
    return call


def step(denoiser: nn.Module, call: dict[str, Any]) -> Work:
    """A denoising step."""
    return torch.no_grad()(lambda: denoiser(**call))


def train_step(denoiser: Any, call: dict[str, Any], trained: Sequence[Tensor], checkpointing: bool) -> Work:
    """Forward and backward. An expert alone has nothing to train: its gradients run through all features to the latents."""

    def run() -> None:
        latents = call["sample"].detach().requires_grad_(not trained)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        loss = denoiser(**{**call, "sample": latents}).sample.float().square().mean()
        torch.autograd.grad(loss, list(trained) or [latents])
        denoiser.disable_gradient_checkpointing()  # an ensemble runs its experts' parts, which must not recompute by themselves

    return run


def measure(options: Options) -> dict[str, Any]:
    """Everything asked for, in one process. The experts' memory is read before there are aggregators."""
    torch.manual_seed(0)
    experts = make_experts(options)
    call = make_call(experts[0], options)
    singles = [step(expert, call) for expert in experts]
    for work in singles:
        work()
    before = peak_memory(options.device)
    model = (
        UNetEnsemble(experts, recipe=recipe(options), placement=options.placement).to(options.device).eval()
    )
    clock = Clock(options.device, list(model.aggregators.values()))
    found: dict[str, Any] = {"setting": setting(options, model, call)}
    found["step"] = rounds("step", clock, singles, step(model, call), options.repeats)
    after = peak_memory(options.device)
    found["peak_memory"] = {"experts_gb": before, "ensemble_gb": after, "difference_gb": after - before}
    if options.train or count_parameters(experts[0]) < SMALL:
        alone = [train_step(expert, call, (), options.gradient_checkpointing) for expert in experts]
        own = train_step(
            model.train(), call, list(model.aggregators.parameters()), options.gradient_checkpointing
        )
        found["training_step"] = rounds("training step", Clock(options.device), alone, own, options.repeats)
        del found["training_step"]["aggregators_share"]  # the backward pass is not watched
    return found


def recipe(options: Options) -> Recipe:
    """How the aggregators are made."""
    return Recipe(
        "sabw",
        {"hidden": options.hidden, "heads": options.heads, "depth": options.depth},
        options.attention_up_to,
    )


def setting(options: Options, model: UNetEnsemble, call: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and with what."""
    return {
        **asdict(options),
        "size": call["sample"].shape[-1] * PIXELS,
        "fused_stages": len(model.fused),
        "expert_parameters": count_parameters(model.experts[0]),
        "aggregator_parameters": count_parameters(model.aggregators),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def as_text(found: dict[str, Any]) -> str:
    """The result as lines."""
    lines = [", ".join(f"{name} {value}" for name, value in found["setting"].items())]
    for part, values in list(found.items())[1:]:
        for name, value in values.items():
            shown = value if isinstance(value, Spread) else f"{value:9.3f}"
            lines.append(f"{part.replace('_', ' '):<14} {name.replace('_', ' '):<24} {shown}")
    return "\n".join(lines)


def main() -> int:
    """-> 0 done, 2 not as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Options)
    try:
        options = read_flags(Options, parser.parse_args())
        found = measure(options)
    except (UserError, ValueError) as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, default=asdict) if options.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
