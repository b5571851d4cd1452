"""What a distillation would do, found before anything is trained: captions, teacher, student, memory."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from afa.aggregators.registry import Recipe
from afa.cost import call_of
from afa.data.sources import ImageSource, Sample
from afa.defaults import distill_rate
from afa.devices import LiveBytes, choose_device, process_device
from afa.distillation.settings import CAPTIONS, DistillSettings
from afa.distillation.student import check_layout, make_student
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.quantised import check_store, kept_elsewhere, kept_tensors, store_weights, stored_bytes
from afa.files import present, refuse_busy, settled
from afa.latents import latents_of
from afa.memory import fake_copy
from afa.models.registry import FAMILIES, family_of
from afa.prompts import read_prompts
from afa.training.finetune import TrainedParameters, add_lora, parameters_at_rank
from afa.training.plan import Memory, TrainingPlan, advice, optimiser_step
from afa.training.prepare import buckets_of, check_objective, find_data, resolution_of
from afa.training.setup import RUNS, guidance_of
from afa.training.sheets import FOLDER as SHEETS
from afa.training.state import FOLDER, state_file
from afa.training.teacher import teaching_method

RECORD = "distill.json"


def trained_part(rank: int | None, model: nn.Module) -> nn.Module:
    """Make what is trained of a student's denoiser trainable, in float32, and return it.

    rank: of a LoRA; None: all weights are trained
    """
    if rank is not None:
        return add_lora(model, rank)
    used = used_parameters(model.float())
    for parameter in used.values():
        parameter.requires_grad_(True)
    return TrainedParameters(used)


def used_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a denoiser by name, without those that do not affect the prediction."""
    stages = FAMILIES[family_of(model)].stages(model)
    unused = {
        id(weight) for stage in stages for part in stage.unused_modules() for weight in part.parameters()
    }
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in unused}


@dataclass(frozen=True)
class DistillPlan(TrainingPlan):
    """What a distillation would do; `--dry-run` stops here. The ensemble is the student alone."""

    def facts(self) -> dict[str, Any]:
        """Return the plan's facts, for people and for --json."""
        settings: Any = self.settings
        assert self.teacher is not None
        model, rank = self.ensemble.denoiser.experts[0], settings.lora
        used = sum(weight.numel() for weight in used_parameters(model).values())
        trained = used if rank is None else parameters_at_rank(model, rank)
        return {
            "teacher": list(self.teacher.names),
            "method": settings.method,
            "student": settings.student,
            "captions": len(self.source.samples) - self.held_out_images,
            "held_out_captions": self.held_out_images,
            "recombine": settings.recombine,
            "resolution": self.resolution,
            "buckets": None if self.buckets is None else self.buckets.facts(),
            "rank": rank,
            "trainable_parameters": trained,
            "guidance": guidance_of(settings, self.teacher) if settings.guidance_in is None else None,
            "guidance_in": settings.guidance_in,
            "steps": settings.steps,
            "latents_a_step": settings.batch_size * settings.accumulate,
            "images_a_step": settings.images_in_batch * settings.accumulate,
            "lr": settings.lr,
        }

    def memory(self) -> dict[str, Any]:
        """Return the expected memory of a step, and options that reduce it. Takes as long as a few steps.

        The step runs on copies without content: the teacher answers, the student is trained.
        """
        settings, teacher = self.settings, self.teacher
        assert isinstance(settings, DistillSettings) and teacher is not None
        side = self.resolution // latents_of(self.ensemble.frame.vae).factor
        step = distill_bytes(
            teacher.denoiser,
            self.ensemble.denoiser,
            settings.batch_size,
            side,
            getattr(torch, settings.dtype),
            settings.lora,
            settings.store,
            settings.set_checkpointing,
        )
        experts = [*self.ensemble.experts, *teacher.experts]
        encoders = {id(encoder): encoder for expert in experts for encoder in expert.text_encoders}
        beside = 0 if settings.cache is not None else sum(map(stored_bytes, encoders.values()))
        frozen = stored_bytes(teacher.denoiser.experts) + stored_bytes(self.ensemble.denoiser.experts)
        found = Memory(step, frozen, beside)
        return {
            "expected_memory_gb": round(found.total / 1e9, 2),
            "for_less_memory": advice(found, settings, settings.store),
        }


def distill_bytes(
    teacher: Any,
    student: Any,
    batch_size: int,
    side: int,
    dtype: torch.dtype,
    rank: int | None,
    store: str | None = None,
    checkpoint: Callable[[Any], None] = lambda denoiser: None,
) -> int:
    """Return the peak bytes of tensors in a step of a distillation.

    teacher, student: drop-in denoisers, of which copies without content are made
    side:       of the latent, in latent pixels
    dtype:      in which the teacher is and everything computes
    rank:       of a LoRA; None: all weights are trained, in float32
    store:      of the teacher's experts, see afa.experts.quantised
    checkpoint: has a denoiser recompute stages
    """
    with torch.device("meta"):
        bare = type(student.experts[0]).from_config(student.experts[0].config)
        if rank is not None:
            add_lora(bare, rank)  # which peft cannot do without content
        empty = type(student)([bare], recipe=Recipe("mean"), placement="out")
    base = torch.float32 if rank is None else dtype
    half = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), half:
        wise, young = fake_copy(teacher, dtype, dtype), fake_copy(empty, base, base)
        trained = _fresh_parameters(young.experts[0], rank is not None)
        checkpoint(young)
        elsewhere = []
        if store is not None:
            store_weights(wise.experts, store)
            elsewhere = kept_elsewhere(wise.experts)
        with LiveBytes(elsewhere) as counter:
            for weight in (*wise.parameters(), *kept_tensors(wise.experts)):
                weight.view(-1)  # they are there in every step
            with torch.no_grad():
                wise(**call_of(wise, side, side, batch_size, dtype=dtype))
            optimiser_step(young.train(), trained, batch_size, side, base, None)
    return counter.peak


def _fresh_parameters(model: nn.Module, lora: bool) -> list[nn.Parameter]:
    """Replace what is trained of a model by new parameters in float32, and return them."""
    found = []
    for name, old in list(model.named_parameters()):
        if not lora or "lora_" in name:
            parent, _, leaf = name.rpartition(".")
            found.append(nn.Parameter(torch.empty(old.shape, dtype=torch.float32)))
            model.get_submodule(parent)._parameters[leaf] = found[-1]
    return found


def plan_distill(settings: DistillSettings, teacher: Ensemble | None = None) -> DistillPlan:
    """Read captions and models, and find everything that would fail later.

    teacher: the ensemble, if it is in memory already
    Raises UserError.
    """
    process_device(settings.device)  # first of all: it says how processes communicate
    source = find_captions(settings)
    check_output(settings)
    own, dtype = teacher is None, getattr(torch, settings.dtype)
    check_store(settings.store, choose_device(settings.device))
    if teacher is None:
        teacher = Ensemble.load(settings.ensemble, dtype=dtype)
    check_layout(settings, teacher)
    if settings.method is not None:
        teaching_method(teacher, settings, settings.guidance_in or guidance_of(settings, teacher))
    student = make_student(settings, teacher)
    if settings.lr is None:
        widest = max(stage.channels for stage in student.denoiser.stages)
        settings = replace(settings, lr=distill_rate(widest))
    if settings.store is not None:
        store_weights(teacher.denoiser.experts, settings.store)
    buckets = buckets_of(settings, student, source)
    check_objective(settings, student, source, buckets)
    pairs = settings.guidance_in is None and guidance_of(settings, teacher)
    if pairs and (settings.batch_size - settings.images_in_batch) % 2:
        raise UserError(
            f"--batch-size {settings.batch_size} is odd, and a sampling with guidance gives two latents; "
            f"give an even number, such as {settings.batch_size + 1}"
        )
    resolution = resolution_of(settings, student)
    more = {"teacher": teacher, "buckets": buckets}
    return DistillPlan(settings, student, source, resolution, own, settings.store, **more)


def find_captions(settings: DistillSettings) -> ImageSource:
    """List the captions: of a text file, or of images, which are not read."""
    if not settings.data.endswith(CAPTIONS):
        return find_data(settings)
    captions = read_prompts(Path(settings.data), "--data", "caption")[: settings.limit]
    samples = [
        Sample(f"line {number}", caption, caption, _no_image) for number, caption in enumerate(captions, 1)
    ]
    return ImageSource(settings.data, samples)


def _no_image() -> bytes:
    raise OSError("a caption has no image")


def check_output(settings: DistillSettings) -> None:
    """Raise UserError for a place that holds something else than this run."""
    output, folder = Path(settings.output), settings.folder
    if settings.single_file and output.is_dir():
        raise UserError(f"--output {output} is a folder; a file of that name cannot be written")
    if folder.is_file():
        raise UserError(f"{folder} is a file; a folder of that name cannot be written")
    refuse_busy(folder)
    begun = state_file(settings).exists() or (settled(folder) / RECORD).exists()
    others = {path.name for path in present(folder)} - {FOLDER, RUNS, SHEETS}
    if not begun and (others or (settings.single_file and output.exists())):
        raise UserError(f"--output {output} exists already; choose another --output or delete it")
