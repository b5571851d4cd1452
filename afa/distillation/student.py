"""The student of a distillation: what it is before training, and the files that it becomes."""

import copy
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from afa.checkpoint.folder import save_expert
from afa.distillation.settings import WEIGHTED, DistillSettings
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.load import load_expert
from afa.experts.lora import fuse
from afa.experts.lora_files import factors_of, save_kohya
from afa.experts.spec import ExpertSpec
from afa.experts.transformer_places import transformer_places
from afa.merging.configs import carried_configs
from afa.merging.engine import model_spec, write
from afa.merging.memory import merge_experts
from afa.merging.plan import make_plan
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader
from afa.places import public_place
from afa.training.finetune import FILE, lora_tensors
from afa.version import __version__

KEY = "afa.distill"  # of a student's header


def make_student(settings: DistillSettings, teacher: Ensemble) -> Ensemble:
    """Return the student alone, before training, with the teacher's VAE, tokenizers and scheduler.

    Its denoiser is its own; text encoders may be the teacher's.
    Raises UserError for a model that is not of the teacher's architecture, or predicts something else.
    """
    first, frame = teacher.experts[0], teacher.frame
    mean = settings.student == WEIGHTED
    if mean:
        student = merge_experts(teacher.experts, "weighted")
    elif settings.student in teacher.names:
        student = teacher.experts[teacher.names.index(settings.student)]
    else:
        spec = ExpertSpec.parse(settings.student, prediction_type=settings.prediction_type)
        student = load_expert(spec, first.dtype, settings.config)
        student = replace(student, name=student.name or "student")
    if not student.text_encoders:
        borrowed = {"text_encoders": first.text_encoders, "pipeline_options": first.pipeline_options}
        student = replace(student, **borrowed)
    reasons = mismatches([first, student])
    if reasons:
        raise UserError("; ".join(reasons))
    model = student.model if mean else fuse(copy.deepcopy(student.model))
    framed = {"vae": frame.vae, "tokenizers": list(frame.tokenizers), "scheduler": frame.scheduler}
    student = replace(student, name="student", model=model, located=None, donor=None, **framed)
    return Ensemble.from_experts([student], aggregator="mean", placement="out")


def check_layout(settings: DistillSettings, teacher: Ensemble) -> None:
    """Raise UserError for an output that would lack parts of the student.

    The file of a transformer holds nothing else, so the mean of text encoders would be lost.
    """
    if settings.lora is not None:
        return
    encoders = [encoder for joined in teacher.text_encoders for encoder in joined.encoders]
    part = next((place for encoder in encoders if (place := getattr(encoder, "left_out", None))), None)
    first, *others = teacher.experts
    alone = settings.single_file and first.family != "unet"  # the file holds the denoiser alone
    if part is not None and not alone:
        raise UserError(
            f"--output {settings.output} is to hold a whole pipeline, and the text encoder in {part} leaves "
            "out parts of its model that texts do not pass through; make the ensemble with the whole text "
            "encoder, or give --lora"
        )
    if not alone:
        return
    shapes = {name: tensor.shape for name, tensor in first.model.state_dict().items()}
    try:
        transformer_places(shapes, first.model)
    except ValueError as error:
        raise UserError(f"--output {settings.output}: {error}; give a folder, or --lora") from None
    own = next((one for one in others if differing(one.text_encoders, first.text_encoders)), None)
    if settings.student == WEIGHTED and own is not None:
        raise UserError(
            f"--output {settings.output}: the file of a transformer holds only the transformer, and the text "
            f"encoders of '{own.name}' are others than those of '{first.name}', so the student has their "
            "mean; give a folder, or the name of an expert as --student"
        )


def differing(one: list[Any], other: list[Any]) -> bool:
    """Whether two experts have other text encoders; equal ones are loaded once."""
    return [id(encoder) for encoder in one] != [id(encoder) for encoder in other]


def write_student(settings: DistillSettings, student: Ensemble, stage: Path, facts: dict[str, Any]) -> None:
    """Write the trained student: into a folder that appears whole, or as one file.

    stage: the folder; it becomes the run's own, which a file stands beside
    facts: of the training, for the headers
    """
    expert, output = student.experts[0], Path(settings.output)
    dtype = getattr(torch, settings.save_dtype)
    header = {"format": "pt", KEY: json.dumps(facts | {"afa": __version__}, sort_keys=True)}
    if settings.lora is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors(expert.model).items()}
        if not settings.single_file:
            (stage / "README.md").write_text(card(settings, facts))
            save_file(tensors, stage / FILE, metadata=header)
            return
        spec = model_spec(expert, f"LoRA distilled from {public_place(settings.ensemble)}")
        save_kohya(output, expert.model, factors_of(tensors), header=header | spec)
        return
    cast = functools.partial(nn.Module.to, device="cpu", dtype=dtype)  # diffusers' own warns of every cast
    model = cast(student.denoiser.experts[0].requires_grad_(False))
    title = f"distilled from {public_place(settings.ensemble)}"
    if settings.single_file and expert.family != "unet":
        model.save_pretrained(stage / "student")
        write_original(stage / "student", output, header, title)
        return
    encoders = [cast(copy.deepcopy(encoder)) for encoder in expert.text_encoders]
    vae = cast(copy.deepcopy(expert.load_vae()))
    whole = replace(expert, model=model, text_encoders=encoders, vae=vae)
    if not settings.single_file:
        save_expert(whole, stage)
        (stage / "README.md").write_text(card(settings, facts))
        return
    save_expert(whole, stage / "student")
    write_original(stage / "student", output, header, title)


def card(settings: DistillSettings, facts: dict[str, Any]) -> str:
    """Return the model card of a student in a folder; all names in it are the user's own."""
    kind = "a model" if settings.lora is None else f"a LoRA of rank {settings.lora}"
    base = "the mean of its experts" if settings.student == WEIGHTED else f"`{facts['student']}`"
    guided = facts["guidance_in"]
    teacher = f"the ensemble `{facts['teacher']}`"
    if facts["method"] is not None:
        teacher = f"the method `{facts['method']}` with the experts of {teacher}"
    drawn = (
        "Draw it with guidance, as any model of its kind."
        if guided is None
        else f"**Draw it with guidance 1** (CFG 1): its prediction has guidance {guided:g} in it."
    )
    use = "It was trained from" if settings.lora is None else "Use it on"
    return (
        f"---\nlibrary_name: diffusers\ntags: [text-to-image]\n---\n\n# Distilled ensemble\n\n"
        f"This is {kind} that predicts as {teacher} does "
        f"(`afa distill`, {facts['steps']} steps). {use} {base}. {drawn}\n"
    )


def write_original(folder: Path, output: Path, header: dict[str, str], title: str) -> None:
    """Move a pipeline's folder, or a transformer's, into a single file of its publisher's layout.

    It is written tensor by tensor.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    plan = make_plan(MergeSettings(experts=[f"student={folder}"], output=f"{folder}.safetensors"))
    (tensors,) = plan.files.values()
    plan.settings, plan.files = replace(plan.settings, output=str(output)), {str(output): tensors}
    strings = header | model_spec(plan.first.expert, title) | carried_configs(plan)
    with Reader() as reader, tqdm(disable=True) as bar:
        write(plan, reader, strings, bar)
    shutil.rmtree(folder)
