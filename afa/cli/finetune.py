"""Train a LoRA on one expert as `afa train` trains aggregators: the control for the effect of the data alone.

Uses the same split, noise, captions and held-out measure at the same seed. Writes
pytorch_lora_weights.safetensors, which diffusers loads, or one file with kohya's names; both are added to an
expert as EXPERT+FILE.
Ctrl-C interrupts it; the same command resumes.
"""

import json
from typing import Any

from afa.training.finetune_settings import LoraSettings as Options

EXAMPLES = [
    "afa finetune demo:patterns --data scenes:200 --rank 4 --output tuned --steps 20 --lr 2e-3",
    "afa finetune demo:patterns --data scenes:200 --like demo:ensemble --output alike --dry-run",
]


def run(options: Options) -> None:
    """Plan, train, and print the result."""
    from afa.cli.main import hush
    from afa.training.finetune import facts, finetune, finetune_finished, plan_finetune

    hush()
    record = finetune_finished(options)
    if record is None:
        planned = plan_finetune(options)
        shown = facts(*planned)
        if options.dry_run or not options.json:
            print(json.dumps(shown, indent=2) if options.json else _plan(shown), flush=True)
        if options.dry_run:
            return
        record = finetune(options, planned)
    print(json.dumps(record, indent=2) if options.json else _result(record, options.output))


def _plan(facts: dict[str, Any]) -> str:
    from afa.data.buckets import plan_lines

    images = f"{facts['training_images']} to train on, {facts['held_out_images']} held out"
    return "\n".join(
        [
            f"expert  {facts['expert']}",
            f"data    {facts['data']}",
            f"        {images}, {facts['resolution']} px",
            *plan_lines(facts, 8),
            f"LoRA    rank {facts['rank']}, {facts['trainable_parameters']:,} parameters",
            f"steps   at most {facts['steps']}, {facts['images_a_step']} images each",
        ]
    )


def _result(record: dict[str, Any], output: str) -> str:
    """Format the measured result as a sentence."""
    from afa.stats import Estimate

    change, trained = (
        Estimate(**record["difference_to_expert"]),
        Estimate(**record["held_out_loss"]["trained"]),
    )
    return (
        f"held-out loss {trained.words(5)} (n = {trained.n}), {change.verdict} that of the expert:"
        f" {change.words(5, signed=True)}, paired{change.too_few('image')}\n"
        f"{record['steps']} steps in {record['seconds']:.0f} s,"
        f" kept the average of step {record['best_step']}; saved in {output}"
    )
