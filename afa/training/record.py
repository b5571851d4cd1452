"""What a finished run leaves behind: its record, which is read instead of training again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from afa.errors import UserError
from afa.fingerprint import FILES
from afa.stats import estimate
from afa.training.loop import Progress, Trainer
from afa.training.settings import LoopSettings
from afa.training.state import check_finished, forget_state
from afa.version import __version__

LEFT_OUT = "left-out.jsonl"  # the images that could not be used, and why


def run_record(trainer: Trainer, progress: Progress, losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what all runs record: settings, versions, course and held-out losses.

    losses: of each held-out image, (n,), by what was measured
    """
    return {
        "settings": asdict(trainer.settings),
        "files": trainer.begun[FILES],
        "afa": __version__,
        "torch": torch.__version__,
        "training_images": len(trainer.data),
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 1),
        "held_out_loss": {name: asdict(estimate(values)) for name, values in losses.items()},
        "history": progress.history,
    }


def check_record(
    settings: LoopSettings, begun: LoopSettings, record: Mapping[str, Any], what: str, more: str = "choose"
) -> None:
    """Raise UserError unless the record of a finished run is that of these settings.

    begun: the recorded settings
    more:  what the user can do if more steps are asked for, before "another --output"
    """
    if settings.steps != begun.steps:  # its state is gone, so it cannot go on
        advice = more if settings.steps > begun.steps else "choose"
        raise UserError(
            f"{what} was finished with --steps {begun.steps} (now {settings.steps}); {advice} another "
            "--output"
        )
    check_finished(settings, begun, record.get("files"), what)
    forget_state(settings)  # where a run was killed while it removed it
