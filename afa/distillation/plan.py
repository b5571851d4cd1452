"""What a distillation would do, found before anything is trained: captions, teacher, student, memory."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from afa.aggregators.registry import count_parameters
from afa.cost import call_of
from afa.data.sources import ImageSource, Sample
from afa.defaults import distill_rate
from afa.devices import LiveBytes, choose_device, process_device
from afa.distillation.settings import CAPTIONS, NEAREST, DistillSettings
from afa.distillation.student import check_layout, make_student, recorded_student
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.quantised import check_store, kept_elsewhere, store_weights, stored_bytes
from afa.files import present, refuse_busy, settled
from afa.latents import latents_of
from afa.memory import fake_copy
from afa.prompts import read_prompts
from afa.training.finetune import add_lora, parameters_at_rank
from afa.training.plan import Memory, TrainingPlan, advice, optimiser_step
from afa.training.prepare import check_objective, find_data, resolution_of
from afa.training.setup import RUNS, guidance_of
from afa.training.sheets import FOLDER as SHEETS
from afa.training.state import FOLDER, state_file

RECORD = "distill.json"


def trained_part(settings: DistillSettings, model: nn.Module) -> nn.Module:
    """Make what is trained of a student's denoiser trainable, in float32, and return it."""
    if settings.lora is None:
        return model.float().requires_grad_(True)
    return add_lora(model, settings.lora)


@dataclass(frozen=True)
class DistillPlan(TrainingPlan):
    """What a distillation would do; `--dry-run` stops here. The ensemble is the student alone."""

    def facts(self) -> dict[str, Any]:
        """Return the plan's facts, for people and for --json."""
        settings: Any = self.settings
        assert self.teacher is not None
        model, rank = self.ensemble.denoiser.experts[0], settings.lora
        trained = count_parameters(model) if rank is None else parameters_at_rank(model, rank)
        return {
            "teacher": list(self.teacher.names),
            "student": settings.student,
            "captions": len(self.source.samples) - self.held_out_images,
            "held_out_captions": self.held_out_images,
            "resolution": self.resolution,
            "rank": rank,
            "trainable_parameters": trained,
            "guidance": guidance_of(settings, self.teacher) if settings.guidance_in is None else None,
            "guidance_in": settings.guidance_in,
            "steps": settings.steps,
            "latents_a_step": settings.batch_size * settings.accumulate,
            "lr": settings.lr,
        }

    def memory(self) -> dict[str, Any]:
        """Return the expected memory of a step, and options that reduce it. Takes as long as a few steps.

        The step runs on copies without content: the teacher answers, the student is trained.
        """
        settings, teacher = self.settings, self.teacher
        assert isinstance(settings, DistillSettings) and teacher is not None
        side = self.resolution // latents_of(self.ensemble.frame.vae).factor
        dtype, size = getattr(torch, settings.dtype), settings.batch_size
        base = torch.float32 if settings.lora is None else dtype
        half = torch.autocast("cpu", dtype) if settings.dtype != "float32" else contextlib.nullcontext()
        with FakeTensorMode(allow_non_fake_inputs=True), half:
            wise, student = (
                fake_copy(one.denoiser, kind, kind) for one, kind in ((teacher, dtype), (self.ensemble, base))
            )
            trained = list(trained_part(settings, student.experts[0]).parameters())
            settings.set_checkpointing(student)
            elsewhere = []
            if settings.store is not None:
                store_weights(wise.experts, settings.store)
                elsewhere = kept_elsewhere(wise.experts)
            with LiveBytes(elsewhere) as counter:
                for weight in wise.parameters():
                    weight.view(-1)  # they are there in every step
                with torch.no_grad():
                    wise(**call_of(wise, side, side, size, dtype=dtype))
                optimiser_step(student.train(), trained, size, side, base, None)
        modules = [*self.ensemble.text_encoders, *teacher.text_encoders, self.ensemble.frame.vae]
        beside = [] if settings.cache is not None else modules
        frozen = stored_bytes(teacher.denoiser.experts) + stored_bytes(self.ensemble.denoiser.experts)
        found = Memory(counter.peak, frozen, sum(map(stored_bytes, beside)))
        return {
            "expected_memory_gb": round(found.total / 1e9, 2),
            "for_less_memory": advice(found, settings, settings.store),
        }


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
    if settings.student == NEAREST and state_file(settings).exists():
        settings = replace(settings, student=recorded_student(settings))
    student = make_student(settings, teacher)
    if settings.lr is None:
        widest = max(stage.channels for stage in student.denoiser.stages)
        settings = replace(settings, lr=distill_rate(widest))
    if settings.store is not None:
        store_weights(teacher.denoiser.experts, settings.store)
    check_objective(settings, student, source)
    if settings.guidance_in is None and guidance_of(settings, teacher) and settings.batch_size % 2:
        raise UserError(
            f"--batch-size {settings.batch_size} is odd, and a sampling with guidance gives two latents; "
            f"give an even number, such as {settings.batch_size + 1}"
        )
    resolution = resolution_of(settings, student)
    return DistillPlan(settings, student, source, resolution, own, settings.store, teacher=teacher)


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
