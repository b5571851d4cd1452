"""Distil an ensemble into one ordinary model: a checkpoint or a LoRA that other programs load.

The student draws samplings of the captions, with few steps; at every latent that it comes to, the ensemble
says what it would predict there, and the student is trained to predict the same. Only captions are needed.
Each training step is a step of some samplings, so the student's own drawing costs nothing beside training.
Text encoders are not trained: where experts have their own, the student has one and learns to use it.
Ctrl-C interrupts it; the same command resumes.
"""

import json
from typing import Any

from afa.distillation.settings import WEIGHTED
from afa.distillation.settings import DistillSettings as Options

EXAMPLES = [
    "afa distill demo:ensemble --data scenes:200 --output student --steps 20",
    "afa distill demo:ensemble --data scenes:9 --student curves --lora 8 --output lora.safetensors --dry-run",
]


def run(options: Options) -> None:
    """Plan, train, and print the result."""
    from afa.cli.main import hush
    from afa.distillation.plan import plan_distill
    from afa.distillation.run import distill, distill_finished

    hush()
    record = distill_finished(options)
    if record is None:
        planned = plan_distill(options)
        shown = planned.facts()
        if options.dry_run:
            shown |= planned.memory()
        if options.dry_run or not options.json:
            print(json.dumps(shown, indent=2) if options.json else _plan(shown), flush=True)
        if options.dry_run:
            return
        record = distill(options, planned)
    print(json.dumps(record, indent=2) if options.json else _result(record, options))


def _plan(facts: dict[str, Any]) -> str:
    trained = "all weights" if facts["rank"] is None else f"a LoRA of rank {facts['rank']}"
    teacher = ", ".join(facts["teacher"])
    if facts["method"] is not None:
        teacher = f"{facts['method']} of {teacher}"
    guided = facts["guidance_in"]
    drawn = "without guidance" if facts["guidance"] is None else f"with guidance {facts['guidance']:g}"
    answers = "as they are" if guided is None else f"with guidance {guided:g}, in one pass"
    captions = f"{facts['captions']} to train on, {facts['held_out_captions']} held out"
    if facts["recombine"] > facts["captions"]:
        captions = f"{facts['captions']}, recombined up to {facts['recombine']}, to train on, "
        captions += f"{facts['held_out_captions']} held out"
    steps = f"at most {facts['steps']}, {facts['latents_a_step']} latents each"
    if facts["images_a_step"]:
        steps += f", of which {facts['images_a_step']} are of noised images"
    from afa.data.buckets import plan_lines

    lines = [
        f"teacher   {teacher}; its predictions {answers}",
        f"student   {facts['student']}: {trained}, {facts['trainable_parameters']:,} parameters",
        f"captions  {captions}; drawn {drawn}, {facts['resolution']} px",
        *plan_lines(facts, 10),
        f"steps     {steps}, learning rate {facts['lr']:g}",
    ]
    if "expected_memory_gb" in facts:
        lines.append(f"memory    about {facts['expected_memory_gb']} GB of tensors in a step")
        lines += [f"          less with {way}" for way in facts["for_less_memory"]]
    return "\n".join(lines)


def _result(record: dict[str, Any], options: Options) -> str:
    """Format the measured result as a sentence."""
    from afa.stats import Estimate

    change, trained = (
        Estimate(**record["difference_to_student"]),
        Estimate(**record["held_out_loss"]["trained"]),
    )
    drawn = "" if options.guidance_in is None else "; draw it with guidance 1, which is in it"
    if options.lora is not None and options.student == WEIGHTED:
        drawn += "; it is for the mean of the experts, which afa merge makes"
    return (
        f"squared distance to the teacher {trained.words(5)} (n = {trained.n} held-out captions),"
        f" {change.words(5, signed=True)} by training, paired{change.too_few('caption')}\n"
        f"{record['steps']} steps in {record['seconds']:.0f} s,"
        f" kept the average of step {record['best_step']}; saved in {options.output}{drawn}"
    )
