"""Train the aggregators of an ensemble on captioned images.

The experts do not change. The trained aggregators are saved with a manifest that refers to the experts.
Ctrl-C interrupts the training; the same command resumes it.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa.training.settings import TrainSettings as Options

EXAMPLES = [
    (
        "afa train --experts demo:curves demo:angles --data scenes:200 --output my-ensemble"
        " --steps 20 --lr 2e-3 --hidden 32"
    ),
    "afa train --start demo:ensemble --data scenes:200 --output further --dry-run",
]


def run(options: Options) -> None:
    """Plan, train, and print the result."""
    from afa.cli.main import hush
    from afa.training.run import finished, plan, train

    hush()
    record = finished(options)
    if record is not None:
        print(
            f"{options.output} is complete; nothing to do"
            if not options.json
            else json.dumps(record, indent=2)
        )
        return
    planned = plan(options)
    facts = planned.facts()
    if facts["few_images"] is not None:
        print(f"afa: {facts['few_images']}", file=sys.stderr)
    if options.dry_run:
        facts |= planned.memory() | planned.time()
        print(json.dumps(facts, indent=2) if options.json else f"{_plan(facts)}\n{_cost(facts)}")
        return
    if not options.json:
        print(_plan(facts), flush=True)
    record = train(options, planned)
    print(json.dumps(record, indent=2) if options.json else _result(record, options.output))


def _plan(facts: dict[str, Any]) -> str:
    """Format the plan."""
    from afa.data.buckets import plan_lines

    options = ", ".join(f"{name} {value}" for name, value in facts["aggregator_options"].items())
    kind = f"{facts['aggregator']}{f' ({options})' if options else ''}, {facts['fused_stages']} stages"
    steps = f"at most {facts['steps']}, {facts['images_a_step']} images each"
    images = f"{facts['training_images']} to train on, {facts['held_out_images']} held out"
    return "\n".join(
        [
            f"experts      {', '.join(facts['experts'])} ({facts['expert_memory_gb']} GB, frozen)",
            f"data         {facts['data']}",
            f"             {images}, {facts['resolution']} px",
            *plan_lines(facts, 13),
            f"aggregators  {kind}, {facts['trainable_parameters']:,} parameters",
            f"             {facts['aggregator_memory_gb']} GB with optimiser and averages",
            f"steps        {steps}, learning rate {facts['lr']:g}",
            *_chosen(facts["chosen_by_afa"]),
        ]
    )


def _chosen(chosen: Mapping[str, Any]) -> list[str]:
    """List the options that afa chose, each with its value and the reason."""
    flags = [f"--{name.replace('_', '-')} {one['value']}" for name, one in chosen.items()]
    width = max(map(len, flags), default=0)
    return [
        f"{'' if place else 'not given':<11}  {flag:<{width}}  {one['why']}"
        for place, (flag, one) in enumerate(zip(flags, chosen.values(), strict=True))
    ]


def _cost(facts: dict[str, Any]) -> str:
    """Format the expected memory and time."""
    lines = [f"memory       about {facts['expected_memory_gb']} GB of tensors in a step"]
    lines += [f"             less with {way}" for way in facts["for_less_memory"]]
    one, measurement = (_duration(facts[name]) for name in ("seconds_a_step", "seconds_a_measurement"))
    parts = f"{one} a step, {measurement} a measurement, after encoding the images"
    return "\n".join([*lines, f"time         about {_duration(facts['seconds'])} here: {parts}"])


def _duration(seconds: float) -> str:
    """Format a duration in s, min or h."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _result(record: dict[str, Any], output: str) -> str:
    """Format the measured result as a table and a sentence."""
    from afa.checkpoint.gains import gains
    from afa.stats import Estimate
    from afa.training.state import FOLDER, KEPT

    lines = [f"held-out loss (95 % interval, n = {record['held_out_loss']['trained']['n']})"]
    width = max(map(len, record["held_out_loss"]))
    lines += [
        f"  {name:<{width}}  {Estimate(**value).words(5)}" for name, value in record["held_out_loss"].items()
    ]
    lines += gains(record)
    lines.append(
        f"{record['steps']} steps in {record['seconds']:.0f} s,"
        f" kept the average of step {record['best_step']}; saved in {output}"
    )
    kept = Path(output) / FOLDER / KEPT
    if kept.exists():
        lines.append(
            f"A larger --steps goes on from here, by {kept} ({kept.stat().st_size / 1e9:.2g} GB), "
            "which may be deleted."
        )
    return "\n".join(lines)
