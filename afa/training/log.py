"""The log of a run: one line of JSON per measurement, also sent to trackers such as tensorboard."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from afa.files import write_atomically
from afa.training.measure import DROPPED, Measured

LOG = "log.jsonl"


class Monitor:
    """Logs measurements and warns about experts that get no weight.

    images: per step, over all processes
    """

    def __init__(self, file: Path, accelerator: Accelerator, images: int) -> None:
        self.file, self.accelerator = file, accelerator
        self.images = images
        self._warned: set[str] = set()
        self._mark = (time.monotonic(), 0)

    def begin(self, step: int, measured: bool) -> None:
        """Start at a step, and remove lines that a killed run logged after its saved state.

        measured: whether the log has a measurement from before
        """
        self._mark = (time.monotonic(), step)
        if self.accelerator.is_main_process and self.file.exists():
            kept = [line for line in self.file.read_text().splitlines() if measured and _step(line) <= step]
            write_atomically(self.file, "".join(f"{line}\n" for line in kept))

    def write(self, entry: dict[str, Any], measured: Measured, lr: float, skipped: int) -> None:
        """Log one measurement, and send its numbers to the trackers.

        entry: what the history keeps, with its step
        """
        began, step = self._mark
        steps = entry["step"] - step
        self._mark = (time.monotonic(), entry["step"])
        facts = {
            "held_out_loss_by_band": measured.by_band(),
            "lr": lr,
            "images_per_second": round(steps * self.images / (time.monotonic() - began), 3)
            if steps
            else None,
            "memory_gb": round(peak_gigabytes(self.accelerator.device), 3),
            "skipped_steps": skipped,
            **({} if measured.routing is None else {"routing": measured.routing.facts()}),
        }
        self._append({**entry, **facts})
        if entry["step"] and measured.routing is not None:
            self._warn(measured.routing.dropped)

    def _append(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(flat(entry), step=entry["step"])

    def _warn(self, dropped: list[str]) -> None:
        """Warn once about each expert."""
        for name in dropped:
            if name not in self._warned and self.accelerator.is_main_process:
                tqdm.write(
                    f"afa: expert '{name}' gets less than {DROPPED:.0%} of the weight everywhere; "
                    "it could be left out",
                    file=sys.stderr,
                )
            self._warned.add(name)


def flat(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers by their path; all else is left out.

    {"loss": {"a": [1, 2]}} becomes {"loss/a/0": 1, "loss/a/1": 2}.
    """
    found: dict[str, float] = {}
    for name, value in entry.items():
        path = f"{prefix}{name}"
        if isinstance(value, list):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if isinstance(value, dict):
            found |= flat(value, f"{path}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[path] = float(value)
    return found


def peak_gigabytes(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the device, or of the process on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def _step(line: str) -> float:
    """Return the step of a line; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
