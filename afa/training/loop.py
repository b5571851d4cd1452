"""The training loop. It resumes from a saved state, and Ctrl-C stops it at the end of a step."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from afa.errors import UserError
from afa.schema import Score, build
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.log import LOG, Monitor
from afa.training.measure import Before, HeldOut, Measured
from afa.training.noise import Batch
from afa.training.objective_terms import Objectives
from afa.training.objectives import Pass
from afa.training.order import images_of_step
from afa.training.settings import LoopSettings
from afa.training.sheets import Sheets
from afa.training.state import load_state, save_state, state_file
from afa.training.teacher import Distillation


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that the step can end; the second stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    for number in before:
        signal.signal(number, note)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


PERSISTS = 10  # steps in a row without a finite gradient: then the run stops


@dataclass
class Progress:
    """How far a run is; all of it is saved.

    best:    held-out objective of the best measurement, and its step
    history: one entry per measurement
    """

    step: int = 0
    best: Score = float("inf")
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    since: Score = 0.0  # training loss summed since the last measurement
    counted: int = 0  # steps in that sum
    skipped: int = 0  # steps without a finite gradient
    skipped_last: int = 0  # of these, the last in a row
    seconds: float = 0.0  # spent in the loop, interruptions left out


@dataclass(frozen=True)
class StepBatch:
    """The random draws of a step: rows of the data, dropped captions, latents with noise and timesteps."""

    rows: list[int]
    dropped: Tensor
    batch: Batch

    def part(self, start: int, stop: int) -> "StepBatch":
        """Return samples start … stop-1."""
        return StepBatch(self.rows[start:stop], self.dropped[start:stop], self.batch.part(start, stop))

    def joined(self, other: "StepBatch") -> "StepBatch":
        """Return these samples and then others."""
        batch = self.batch.joined(other.batch)
        return StepBatch(self.rows + other.rows, torch.cat([self.dropped, other.dropped]), batch)


class Trainer:
    """Trains some modules of one ensemble's denoiser; all else is frozen, but gradients pass through it.

    trained: the trained parameters, as one module
    begun:   settings and files that must be the same when the run resumes (see state.belongings)
    sheets:  sample sheets that are drawn at measurements; None: none
    distillation: a teacher, and running samplings that are trained on; None: noised images are
    """

    def __init__(
        self,
        settings: LoopSettings,
        accelerator: Accelerator,
        denoiser: Any,
        objectives: Objectives,
        conditions: Conditions,
        data: Encoded,
        held_out: Encoded,
        trained: nn.Module,
        begun: dict[str, Any],
        sheets: Sheets | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.settings, self.accelerator, self.denoiser = settings, accelerator, denoiser
        self.noising, self.total, self.conditions = objectives.noising, objectives.training, conditions
        self.data, self.begun, self.sheets = data, begun, sheets
        teacher, running, batch, images = distillation or (None, None, None, data)
        self.teacher, self.running, self.images = teacher, running, images
        size = settings.batch_size
        self.asked = 0 if running is None else size - (settings.images_in_batch if images else 0)
        self.held_out = HeldOut(held_out, objectives, conditions, size, teacher=teacher, batch=batch)
        self.group = (
            denoiser.group
        )  # processes that share the experts; None: each has all, and its own images
        self.processes = 1 if self.group is not None else accelerator.num_processes
        images = settings.batch_size * settings.accumulate * self.processes
        self.monitor = Monitor(state_file(settings).with_name(LOG), accelerator, images)
        self.trained = trained
        self.parameters = list(self.trained.parameters())
        self.wrapped: nn.Module = accelerator.prepare(denoiser) if self.processes > 1 else denoiser
        self.optimiser = torch.optim.AdamW(self.parameters, settings.lr, weight_decay=settings.weight_decay)
        self.average = EMAModel(self.parameters, decay=settings.ema)
        self.progress = Progress()
        self.before: Before | None = None
        self.best: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    def train(self) -> Progress:
        """Run to the end and put the best average of the weights in place.

        Raises KeyboardInterrupt after Ctrl-C, once the state is saved.
        """
        first = self._resume()
        self._resumed = time.monotonic() - self.progress.seconds
        self.monitor.begin(self.progress.step, measured=bool(self.progress.history))
        self.denoiser.train()
        bar = tqdm(
            total=self.settings.steps,
            initial=self.progress.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            file=sys.stderr,
        )
        with interruptible() as interrupted, bar:
            while self.progress.step < self.settings.steps and not self._stopped_falling():
                if self.progress.step == 0 and not self.progress.history:
                    self._evaluate(None, first)
                loss = self._step()
                bar.update()
                bar.set_postfix(
                    loss="skipped" if loss is None else f"{loss:.4f}",
                    held_out=f"{self.progress.best:.5f}@{self.progress.best_step}",
                )
                self._after_step(loss)
                if self._any(interrupted.is_set()):
                    self._save()
                    raise KeyboardInterrupt(
                        f"interrupted after step {self.progress.step}; the state is saved, "
                        "the same command goes on from there"
                    )
        self._save()  # what follows may fail (a full disk) without losing what was trained
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        return self.progress

    def held_out_losses(self) -> np.ndarray:
        """Return the loss of each held-out image, (n,), for the denoiser as it is now."""
        return self.held_out.measure(self.denoiser).losses

    def _step(self) -> float | None:
        """Do one optimiser step over all processes.

        Returns this process's loss; None if the step was skipped because a gradient was not finite.
        """
        settings, total = self.settings, 0.0
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.progress.step)
        drawn = self._draw()
        for micro in range(settings.accumulate):
            self._seed_dropout(micro)
            total += self._backward(drawn, micro)
        if self.group is not None:
            self.group.average_gradients(self.parameters)
        norm = self.accelerator.clip_grad_norm_(self.parameters, settings.clip)
        finite = norm is None or bool(
            torch.isfinite(torch.as_tensor(norm))
        )  # the same on all processes: gradients are
        if finite:
            self.optimiser.step()
            self.average.step(self.parameters)
        self.optimiser.zero_grad()
        return total if finite else None

    def _backward(self, drawn: list[StepBatch], micro: int) -> float:
        """Add the gradients of one batch of this process, and return its part of the loss."""
        device, parts, total = self.accelerator.device, self._parts(drawn, micro), 0.0
        whole = sum(len(part.rows) for part in parts)
        for number, part in enumerate(parts):
            batch, dropped = part.batch.to(device), part.dropped.to(device)
            rows, call, teacher = part.rows, self.wrapped, self.teacher
            work = Pass.of(
                self.denoiser, self.noising, self.conditions, self.data, rows, batch, dropped, call, teacher
            )
            work.asked = self.asked if number == 0 else 0  # samplings come first
            loss = self.total.sum(self.total.losses(work)).mean() * (len(rows) / whole)
            loss = loss / self.settings.accumulate
            self.accelerator.backward(loss)
            total += float(loss.item())
            if self.running is not None and number == 0:
                predictions = self.accelerator.gather(work.prediction.detach()[: self.asked]).cpu()
                self.running.advance(self.progress.step, micro * len(predictions), predictions)
        return total

    def _draw(self) -> list[StepBatch]:
        """Draw everything random of a whole step, for all processes: running samplings, and noised images.

        It depends on seed and step only (and on running samplings), so a resumed run, or another number of
        processes, draws the same.
        """
        step, found = self.progress.step, []
        if self.running is not None:
            found.append(StepBatch(*self.running.draw(step)))
        if self.images is not None:
            rng = torch.Generator().manual_seed(_seed_of(self.settings.seed, step, 0, 0))
            chosen = self._choose(self.images)
            dropped = torch.rand(len(chosen), generator=rng) < self.settings.caption_dropout
            rows = self.images.rows(chosen, rng)
            batch = self.noising.draw(self.images, rows, rng, self.total.extra_noise)
            first = len(self.data.captions) - len(self.images.captions)  # images come last in the data
            found.append(StepBatch([first + row for row in rows], dropped, batch))
        return found

    def _seed_dropout(self, micro: int) -> None:
        """Seed what the draws leave to torch: dropout depends on seed, step and the place of the batch."""
        place = self._place(micro) * self.settings.batch_size
        torch.manual_seed(_seed_of(self.settings.seed, self.progress.step, 1, place))

    def _place(self, micro: int) -> int:
        """Return which of the step's batches is this process's."""
        return micro * self.processes + (self.accelerator.process_index if self.processes > 1 else 0)

    def _parts(self, drawn: list[StepBatch], micro: int) -> list[StepBatch]:
        """Return a batch of this process: its samplings and then its images, apart if their sizes differ."""
        place, batches = self._place(micro), self.settings.accumulate * self.processes
        sizes = [len(part.rows) // batches for part in drawn]
        parts = [part.part(place * size, (place + 1) * size) for part, size in zip(drawn, sizes, strict=True)]
        alike = len({part.batch.latents.shape[1:] for part in parts}) == 1
        return [parts[0].joined(parts[1])] if alike and len(parts) == 2 else parts

    def _choose(self, images: Encoded) -> list[int]:
        """Return the images of a step, for all processes.

        They are of one size, so a step is the same however it is divided among processes and batches.
        """
        size = (self.settings.batch_size - self.asked) * self.settings.accumulate * self.processes
        return images_of_step(images.groups, self.progress.step, size, self.settings.seed)

    def _after_step(self, loss: float | None) -> None:
        progress, settings = self.progress, self.settings
        progress.step += 1
        if loss is None:
            self._skipped()
        else:
            progress.skipped_last = 0
            progress.since += loss
            progress.counted += 1
        if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
            self._evaluate(progress.since / progress.counted if progress.counted else None)
            progress.since, progress.counted = 0.0, 0
        if progress.step % settings.save_every == 0:
            self._save()

    def _skipped(self) -> None:
        """Count a skipped step. Raises UserError with the likely cause after too many in a row."""
        progress = self.progress
        progress.skipped += 1
        progress.skipped_last += 1
        if progress.skipped_last < PERSISTS:
            return
        broken = self.held_out.broken(self.denoiser)
        reason = (
            f"expert '{broken[0]}' alone already predicts what is no number; use --dtype float32, "
            "or leave it out"
            if broken
            else "the experts alone are fine, so what is trained has run away; "
            f"lower --lr (now {self.settings.lr:g})"
        )
        raise UserError(
            f"no finite gradient for {PERSISTS} steps in a row, up to step {progress.step}: {reason}"
        )

    def _evaluate(self, training_loss: float | None, measured: Measured | None = None) -> None:
        """Measure the average of the trained weights, and keep it if it is the best so far.

        measured: the measurement, if it was made already
        """
        progress, settings = self.progress, self.settings
        if progress.step:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        measured = measured or self.held_out.measure(self.denoiser, whole=True)
        entry: dict[str, Any] = {
            "step": progress.step,
            "training_loss": training_loss,
            "held_out_loss": measured.loss,
        }
        if measured.terms:
            entry |= {"objective": measured.objective, "terms": measured.terms}
        if (
            self.sheets is not None
            and self.accelerator.is_main_process
            and progress.step % self.settings.sheet_every == 0
        ):
            entry |= self.sheets.draw(progress.step)
        progress.history.append(entry)
        if measured.objective < progress.best:
            progress.best, progress.best_step = measured.objective, progress.step
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        if progress.step:
            self.average.restore(self.parameters)
        self.monitor.write(entry, measured, settings.rate(max(0, progress.step - 1)), progress.skipped)

    def _stopped_falling(self) -> bool:
        return (
            self.progress.step - self.progress.best_step
            >= self.settings.patience * self.settings.evaluate_every
        )

    def _any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process, since all must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device))
        return bool(flags.any())

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._resumed
        if self.accelerator.is_main_process:
            state = {
                "optimiser": self.optimiser.state_dict(),
                "average": self.average.state_dict(),
                "progress": asdict(self.progress),
            }
            if self.running is not None:
                state["running"] = self.running.state()
            shared = {"data": self.data.digest, "aggregators": self.trained.state_dict(), "best": self.best}
            assert self.before is not None
            save_state(self.settings, self.begun, {**shared, **state, "before": self.before.as_state()})

    def _resume(self) -> Measured | None:
        """Restore the saved state, if there is one; else measure what is there before the first step.

        Returns that measurement; None if it was made before.
        Raises UserError if the state is of other data, or of other kinds or shapes of parts.
        """
        state, first = load_state(self.settings, self.begun, self.accelerator.device), None
        if state is None or "before" not in state:  # of an earlier version
            first = self.held_out.measure(self.denoiser, whole=True)
            self.before = Before(first.losses, first.maps, self.held_out.experts(self.denoiser))
        if state is not None:
            self._restore(state)
        return first

    def _restore(self, state: dict[str, Any]) -> None:
        """Put a saved state in place."""
        file = state_file(self.settings)
        try:
            if str(state["data"]) != self.data.digest:
                what = (
                    f"the images or captions of --data {self.settings.data} have changed since the run in "
                    f"{self.settings.output}"
                )
                raise UserError(f"{what} was begun; give another --output")
            self.trained.load_state_dict(state["aggregators"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.load_state_dict(state["average"])
            if self.running is not None:
                self.running.load(state["running"])
            moments = state["optimiser"]["state"]
            columns = [
                [moments[place][name] for place in sorted(moments)]
                for name in ("exp_avg", "exp_avg_sq")
                if moments
            ]
            for column in (state["best"], state["average"]["shadow_params"], *columns):
                if [tensor.shape for tensor in column] != [parameter.shape for parameter in self.parameters]:
                    raise ValueError("its tensors are of other shapes")
            self.best, self.progress = state["best"], build(Progress, state["progress"], file, "progress")
            self.before = self.before or Before.of_state(state["before"], len(self.held_out.data))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is no state of this run ({reason}); delete it to begin again") from None
