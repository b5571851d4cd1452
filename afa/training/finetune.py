"""The trained baseline: one expert with a LoRA of as many parameters, at equal steps or equal compute.

It works for denoisers of all families.
Source: Hu et al., arXiv:2106.09685, by way of peft. Deviation: besides the attention it adapts the
feed-forward layers and the convolutions of residual blocks, so that it reaches the whole network, as
aggregators at all stages do.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor, nn

from afa.aggregators.registry import Recipe
from afa.checkpoint.manifest import read_manifest
from afa.cost import count_training_flops
from afa.denoiser.base import EnsembleDenoiser
from afa.devices import process_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.lora_files import factors_of, kohya_tensors, save_kohya
from afa.files import locked, staged
from afa.models.registry import FAMILIES, family_of
from afa.places import public_place
from afa.stages.stage import base_layer
from afa.stats import difference
from afa.training.finetune_settings import LoraSettings
from afa.training.plan import TrainingPlan
from afa.training.prepare import buckets_of, check_objective, find_data, resolution_of
from afa.training.record import LEFT_OUT, check_record, check_there, finished_record, run_record
from afa.training.run import check_output
from afa.training.setup import end_run, make_accelerator, make_trainer
from afa.training.state import state_file
from afa.version import __version__

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
Layer = nn.Linear | nn.Conv2d


def adapted(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield the layers of a denoiser that get a LoRA, with their names.

    They are the attention, feed-forward and residual convolution layers of all stages, without layers that do
    not affect the prediction. Of a layer that has a LoRA already, the base layer is meant.
    """
    stages = FAMILIES[family_of(model)].stages(model)
    chosen = {
        id(base_layer(layer))
        for stage in stages
        for layer in (
            *(layer for part in _inside(stage.modules()) for layer in _layers(part)),
            *(part for part in _inside(stage.feed_forward()) if isinstance(part, nn.Linear)),
        )
    }
    chosen -= {id(layer) for stage in stages for layer in _inside(stage.unused_modules())}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")
        if isinstance(module, Layer) and id(module) in chosen and "lora_" not in path:
            yield name, module


def _inside(modules: Iterable[object]) -> Iterator[nn.Module]:
    """Yield all sub-modules of some modules."""
    return (part for module in modules if isinstance(module, nn.Module) for part in module.modules())


def _layers(part: nn.Module) -> list[nn.Module]:
    """Return the layers of one module that get a LoRA; [] for other kinds of modules."""
    if hasattr(part, "to_q") or isinstance(part, (AttentionModuleMixin, FeedForward)):
        return [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
    if isinstance(part, ResnetBlock2D):
        return [part.conv1, part.conv2]
    if hasattr(part, "proj_mlp"):  # feeds forward beside its attention, as FLUX's single blocks do
        return [part.proj_mlp, part.proj_out]
    return []


def parameters_at_rank(model: nn.Module, rank: int) -> int:
    """Return how many parameters a LoRA of this rank trains on a denoiser that has none yet."""
    return rank * sum(_in_and_out(module) for _, module in adapted(model))


def matching_rank(model: nn.Module, parameters: int) -> int:
    """Return the smallest rank with at least this many trained parameters."""
    return max(1, math.ceil(parameters / parameters_at_rank(model, 1)))


def _in_and_out(module: Layer) -> int:
    """Return the parameters of rank 1: the module's inputs (times its kernel) plus its outputs."""
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    return module.in_channels * math.prod(module.kernel_size) + module.out_channels


def add_lora(model: nn.Module, rank: int) -> "TrainedParameters":
    """Put a LoRA into a frozen denoiser, in float32, and return its parameters.

    It changes no prediction until it is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[name for name, _ in adapted(model)], init_lora_weights=True
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return TrainedParameters(parameters)


class TrainedParameters(nn.Module):
    """Some parameters, wherever in a model they are, as one module."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", ":"), parameter)  # module names may hold no dots


def component_of(model: nn.Module) -> str:
    """Return the pipeline's name for this kind of denoiser: unet or transformer."""
    return FAMILIES[family_of(model)].component


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a denoiser's LoRA in diffusers' file format.

    Names are unet.… or transformer.….lora_A.weight; alpha equals the rank.
    """
    from peft import get_peft_model_state_dict

    found: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {
        f"{component_of(model)}.{name}": tensor.detach().contiguous().cpu() for name, tensor in found.items()
    }


def fuse_lora(model: Any, file: Path) -> None:
    """Add a LoRA file to a denoiser's own weights."""
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=component_of(model))
    model.fuse_lora()
    model.unload_lora()


RECORD = "finetune.json"


def plan_finetune(settings: LoraSettings, alone: Ensemble | None = None) -> tuple[TrainingPlan, int]:
    """Return the training plan and the rank. It finds everything that would fail later.

    alone: an ensemble of the one expert, if it is in memory already; its denoiser is changed
    Raises UserError.
    """
    process_device(settings.device)  # first of all: it says how processes communicate
    source = find_data(settings)
    if not (settings.folder / RECORD).exists():
        check_output(settings)
        if settings.single_file and not state_file(settings).exists():
            check_file(Path(settings.output))
    wanted = None if settings.like is None else read_manifest(Path(settings.like)).aggregator["parameters"]
    own = alone is None
    if alone is None:
        dtype = getattr(torch, settings.dtype)
        framed = {"vae": settings.vae, "frame": settings.frame, "text_encoders": settings.text_encoder or ()}
        read = {"dtype": dtype, "config": settings.config, "prediction_type": settings.prediction_type}
        alone = Ensemble.from_experts([settings.expert], aggregator="mean", placement="out", **read, **framed)
    buckets = buckets_of(settings, alone, source)
    check_objective(settings, alone, source, buckets)
    if settings.single_file:
        check_names(alone.denoiser.experts[0])
    rank = settings.rank or matching_rank(alone.denoiser.experts[0], wanted)
    resolution = resolution_of(settings, alone)
    return TrainingPlan(settings, alone, source, resolution, own, buckets=buckets), rank


def check_file(output: Path) -> None:
    """Raise UserError for a place that cannot become a new file."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; a file of that name cannot be written")
    if output.exists():
        raise UserError(f"--output {output} exists already; choose another --output or delete it")


def check_names(model: nn.Module) -> None:
    """Raise UserError if a layer that gets a LoRA has no name in other programs."""
    number = torch.zeros(1, 1)
    kohya_tensors(model, {name: (number, number) for name, _ in adapted(model)})


def facts(planned: TrainingPlan, rank: int) -> dict[str, Any]:
    """Return the plan's facts, for people and for --json."""
    return {
        "expert": planned.ensemble.names[0],
        **planned.run_facts(),
        "rank": rank,
        "trainable_parameters": parameters_at_rank(planned.ensemble.denoiser.experts[0], rank),
    }


def finetune_finished(settings: LoraSettings) -> dict[str, Any] | None:
    """Return the record of a complete run; None if there is none. Raises UserError if it was another run."""
    found = finished_record(settings, RECORD)
    if found is None:
        return None
    record, begun = found
    check_record(settings, begun, record, f"the LoRA in {settings.output}")
    check_there(settings, RECORD, "train")
    return record


def finetune(
    settings: LoraSettings, planned: tuple[TrainingPlan, int] | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Train a LoRA, write it to settings.output, and return the record that is kept beside it.

    keep: where to move the last state, so that a longer run can continue from it (see begin_from); None:
          delete it
    Data, split, noise, timesteps, dropped captions and held-out loss are those of `afa train` with the same
    seed. A run resumes from its saved state; a complete run is only read.
    Raises UserError, and KeyboardInterrupt after the state is saved.
    """
    with contextlib.ExitStack() as stack:
        if finetune_finished(settings) is None:
            stack.enter_context(locked(settings.folder))
            if settings.single_file:
                stack.enter_context(locked(Path(settings.output), file=True))
        return finetune_finished(settings) or _finetune(settings, *(planned or plan_finetune(settings)), keep)


def _finetune(settings: LoraSettings, work: TrainingPlan, rank: int, keep: Path | None) -> dict[str, Any]:
    accelerator = make_accelerator(settings)
    trainer = make_trainer(work, accelerator, lambda alone: add_lora(alone.denoiser.experts[0], rank))
    progress = trainer.train()
    assert trainer.before is not None
    before, after = trainer.before.losses, trainer.held_out_losses()
    record = {
        **run_record(trainer, progress, {"trained": after, "expert": before}),
        "rank": rank,
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "difference_to_expert": asdict(difference(after, before)),  # paired over the held-out images
        "left_out": work.source.skipped.counts(),
    }
    if accelerator.is_main_process:
        with staged(settings.folder, last=RECORD) as stage:
            metadata = {
                "format": "pt",
                "afa": __version__,
                "expert": public_place(settings.expert),
                "rank": str(rank),
            }
            model = work.ensemble.denoiser.experts[0]
            tensors = lora_tensors(model)
            if settings.single_file:
                save_kohya(Path(settings.output), model, factors_of(tensors), header=metadata)
            else:
                save_file(tensors, stage / FILE, metadata=metadata)
            work.source.skipped.write(stage / LEFT_OUT)
            (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    end_run(settings, accelerator, keep)
    return record


def equal_compute_steps(steps: int, denoiser: EnsembleDenoiser, rank: int, batch_size: int) -> int:
    """Return how many steps of a LoRA cost as much as `steps` steps of training the aggregators.

    Floating point operations of forward and backward passes are counted (see afa.cost). What both runs do
    once (text encoders, VAE, optimiser) is left out.
    """
    side = denoiser.side
    with torch.device("meta"):
        experts = [type(expert).from_config(expert.config) for expert in denoiser.experts]
        ensemble = type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement)
        whole = count_training_flops(ensemble, side, side, batch_size)
        single = type(denoiser)(experts[:1], recipe=Recipe("mean"), placement="out")
        add_lora(single.experts[0], rank)
    return round(steps * whole / count_training_flops(single, side, side, batch_size))
