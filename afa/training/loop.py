"""The training loop: steps, measurements, early stopping, states, interruption."""

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
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.objective import Objective
from afa.training.settings import LoopSettings
from afa.training.state import load_state, save_state

EVALUATION_SEED = 777  # of the held-out noise: the same for every run, so that runs can be compared


@dataclass
class Progress:
    """Where a run stands, all of it saved.

    best: held-out loss of the best measurement, and its step. history: one entry a measurement.
    """

    step: int = 0
    best: float = float("inf")
    best_step: int = 0
    history: list[dict[str, float | None]] = field(default_factory=list)
    since: float = 0.0  # training loss summed since the last measurement
    counted: int = 0  # steps in that sum
    seconds: float = 0.0  # spent in the loop, interruptions left out


class Trainer:
    """Trains a part of one ensemble's denoiser; all else is frozen, but gradients pass through it.

    trained: what is trained, as a module of its own; default the denoiser's aggregators.
    """

    def __init__(
        self, settings: LoopSettings, accelerator: Accelerator, denoiser: Any, objective: Objective, conditions: Conditions,
        data: Encoded, held_out: Encoded, trained: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.accelerator, self.objective, self.conditions = settings, accelerator, objective, conditions
        self.data, self.held_out, self.denoiser = data, held_out, denoiser
        self.trained: nn.Module = denoiser.aggregators if trained is None else trained
        self.parameters = list(self.trained.parameters())
        self.wrapped: nn.Module = accelerator.prepare(denoiser) if accelerator.num_processes > 1 else denoiser
        self.optimiser = torch.optim.AdamW(self.parameters, settings.lr, weight_decay=settings.weight_decay)
        self.average = EMAModel(self.parameters, decay=settings.ema)
        self.measure = objective.spread(held_out, EVALUATION_SEED)
        self.progress = Progress()
        self.best: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    def train(self) -> Progress:
        """Run to the end, or to Ctrl-C: then the state is saved and KeyboardInterrupt raised. Leaves the best average in place."""
        self._resume()
        self._resumed = time.monotonic() - self.progress.seconds
        self.denoiser.train()
        with _interruptible() as interrupted, self._bar() as bar:
            while self.progress.step < self.settings.steps and not self._stopped_falling():
                if self.progress.step == 0 and not self.progress.history:
                    self._evaluate(None)
                loss = self._step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", held_out=f"{self.progress.best:.5f}@{self.progress.best_step}")
                self._after_step(loss)
                if self._any(interrupted.is_set()):
                    self._save()
                    raise KeyboardInterrupt(f"interrupted after step {self.progress.step}; the state is saved, the same command goes on from there")
        self._save()  # what follows may fail (a full disk) without losing what was trained
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        return self.progress

    def held_out_losses(self) -> np.ndarray:
        """Loss of every held-out sample, (n,), of the denoiser as it is now."""
        size, losses = self.settings.batch_size, []
        none = torch.zeros(size, dtype=torch.bool)
        for start in range(0, len(self.held_out), size):
            stop = min(start + size, len(self.held_out))
            text = self.conditions(self.held_out.captions[start:stop], self.held_out.sizes[start:stop], none[: stop - start])
            with torch.no_grad():
                losses.append(self.objective.loss(self.denoiser, self.measure.part(start, stop), text, self._dtype))
        return torch.cat(losses).double().cpu().numpy()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.denoiser.experts.parameters()).dtype

    def _step(self) -> float:
        """One optimiser step over all processes: -> the loss of this one."""
        settings, total = self.settings, 0.0
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.progress.step + 1) / max(settings.warm_up, 1))
        for micro in range(settings.accumulate):
            rng = self._generator(micro)
            chosen = self._choose(micro)
            dropped = torch.rand(len(chosen), generator=rng) < settings.caption_dropout
            text = self.conditions([self.data.captions[index] for index in chosen], self.data.sizes[chosen], dropped)
            batch = self.objective.draw(self.data, chosen, rng)
            loss = self.objective.loss(self.wrapped, batch, text, self._dtype).mean() / settings.accumulate
            self.accelerator.backward(loss)
            total += loss.item()
        if not np.isfinite(total):
            raise UserError(f"the loss is {total} at step {self.progress.step}; lower --lr (now {settings.lr:g}), or use --dtype float32")
        self.accelerator.clip_grad_norm_(self.parameters, settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.average.step(self.parameters)
        return total

    def _generator(self, micro: int) -> torch.Generator:
        """Random numbers that depend on seed, step, process and batch only: a resumed run draws the same."""
        key = (self.settings.seed, self.progress.step, self.accelerator.process_index, micro)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _choose(self, micro: int) -> list[int]:
        """The examples of this batch: every epoch goes once through all of them in its own order."""
        size, processes = self.settings.batch_size, self.accelerator.num_processes
        batch = (self.progress.step * self.settings.accumulate + micro) * processes + self.accelerator.process_index
        places = [divmod(place, len(self.data)) for place in range(batch * size, (batch + 1) * size)]
        orders = {epoch: np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.data)) for epoch, _ in places}
        return [int(orders[epoch][place]) for epoch, place in places]

    def _after_step(self, loss: float) -> None:
        progress, settings = self.progress, self.settings
        progress.step += 1
        progress.since += loss
        progress.counted += 1
        if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
            self._evaluate(progress.since / progress.counted)
            progress.since, progress.counted = 0.0, 0
        if progress.step % settings.save_every == 0:
            self._save()

    def _evaluate(self, training_loss: float | None) -> None:
        """Measure the average of the aggregators; keep it if it is the best so far."""
        progress = self.progress
        if progress.step:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        loss = float(self.held_out_losses().mean())
        progress.history.append({"step": progress.step, "training_loss": training_loss, "held_out_loss": loss})
        if loss < progress.best:
            progress.best, progress.best_step = loss, progress.step
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        if progress.step:
            self.average.restore(self.parameters)

    def _stopped_falling(self) -> bool:
        return self.progress.step - self.progress.best_step >= self.settings.patience * self.settings.evaluate_every

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process: all must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device))
        return bool(flags.any())

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._resumed
        if self.accelerator.is_main_process:
            state = {"optimiser": self.optimiser.state_dict(), "average": self.average.state_dict(), "progress": asdict(self.progress)}
            save_state(self.settings, {"aggregators": self.trained.state_dict(), "best": self.best, **state})

    def _resume(self) -> None:
        state = load_state(self.settings, self.accelerator.device)
        if state is not None:
            self.trained.load_state_dict(state["aggregators"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.load_state_dict(state["average"])
            self.best, self.progress = state["best"], Progress(**state["progress"])

    def _bar(self) -> tqdm:
        quiet = not self.accelerator.is_main_process
        return tqdm(total=self.settings.steps, initial=self.progress.step, desc="training", unit="step", disable=quiet, file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that a step can end; the second one stops at once."""
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
