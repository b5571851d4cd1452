"""One training loop for all networks of the embedded world; each step is deterministic, and a run resumes."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import trange

from afa.files import replacing

SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Schedule:
    """Number of steps, learning rate and batch size.

    average: decay of the moving average that is kept; None: keep the last weights
    last:    step at which training ends, before the learning rate has fallen; None: the last of `steps`
    """

    steps: int
    rate: float
    batch: int
    average: float | None = None
    warm_up: int = 100
    last: int | None = None

    @property
    def end(self) -> int:
        """Return the number of steps that are made."""
        return self.last or self.steps

    def divided(self, quick: int) -> "Schedule":
        """Return it with its steps divided by `quick`, to try the machinery."""
        last = None if self.last is None else self.last // quick
        return replace(self, steps=self.steps // quick, last=last)

    def factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 3 %."""
        fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())
        return min(1.0, (step + 1) / self.warm_up) * (0.97 * fall + 0.03)


def mixed_precision() -> torch.autocast:
    """Compute in bfloat16 where the processor does; elsewhere float32 is ten times faster."""
    able = torch.cpu.get_capabilities()
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    )


def fit(
    name: str, model: nn.Module, loss: Callable[[torch.Generator], Tensor], schedule: Schedule, work: Path
) -> None:
    """Train a model in place, or resume its training.

    loss: takes a generator that all its random numbers come from, and returns a scalar
    work: the folder of work/name.pt (the state) and work/name.json (seconds, mean loss of each hundred steps)
    """
    rate = torch.optim.AdamW(
        model.parameters(), schedule.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = _State(work / name, model, rate, schedule)
    if state.done:
        return
    model.train()
    started = time.monotonic()
    with trange(schedule.end, initial=state.step, desc=name, mininterval=5) as bar:
        while state.step < schedule.end:
            for group in rate.param_groups:
                group["lr"] = schedule.rate * schedule.factor(state.step)
            value = loss(torch.Generator().manual_seed(state.step))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate.step()
            rate.zero_grad()
            state.count(value.item())
            bar.update()
            if state.step % SAVE_EVERY == 0 or state.step == schedule.end:
                bar.set_postfix(loss=state.losses[-1])
                state.save(time.monotonic() - started)
                started = time.monotonic()
    state.finish()


class _State:
    """What a run needs to resume: weights, optimiser, average, step, losses."""

    def __init__(
        self, path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, schedule: Schedule
    ) -> None:
        self.path, self.model, self.optimiser, self.schedule = path, model, optimiser, schedule
        self.average = (
            None
            if schedule.average is None
            else EMAModel(model.parameters(), decay=schedule.average, foreach=True)
        )
        self.step, self.seconds, self.done = 0, 0.0, False
        self.losses: list[float] = []
        self._since: list[float] = []  # losses since the last mean; empty whenever the state is saved
        if self._file.exists():
            self._load()

    @property
    def _file(self) -> Path:
        return self.path.with_suffix(".pt")

    def _load(self) -> None:
        saved = torch.load(self._file, weights_only=True)
        if saved["steps"] != self.schedule.steps:
            raise SystemExit(
                f"{self._file} was started with {saved['steps']} steps, now {self.schedule.steps}; "
                "delete it or keep the steps"
            )
        self.model.load_state_dict(saved["model"])
        self.step, self.seconds, self.losses, self.done = (
            saved[key] for key in ("step", "seconds", "losses", "done")
        )
        if not self.done:
            self.optimiser.load_state_dict(saved["optimiser"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])

    def count(self, value: float) -> None:
        if self.average is not None:
            self.average.step(self.model.parameters())
        self.step += 1
        self._since.append(value)
        if self.step % SAVE_EVERY == 0 or self.step == self.schedule.end:
            self.losses.append(round(sum(self._since) / len(self._since), 5))
            self._since = []

    def save(self, seconds: float) -> None:
        self.seconds += seconds
        going = {} if self.done else {"optimiser": self.optimiser.state_dict()}
        if self.average is not None and not self.done:
            going["average"] = self.average.state_dict()
        state = {
            "model": self.model.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        state |= {"done": self.done, "steps": self.schedule.steps, **going}
        with replacing(self._file) as temporary:
            torch.save(state, temporary)
        record = {
            "steps": self.step,
            "batch": self.schedule.batch,
            "seconds": round(self.seconds),
            "losses": self.losses,
        }
        self.path.with_suffix(".json").write_text(json.dumps(record))

    def finish(self) -> None:
        """Take the average's weights, if there is one, and drop the state that only training needs."""
        if self.average is not None:
            self.average.copy_to(self.model.parameters())
        self.done = True
        self.save(0.0)
