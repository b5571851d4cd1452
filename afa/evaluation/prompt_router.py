"""The row of the prompt router: one expert for each prompt, at the cost of one model."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState

from afa.evaluation.rows import MethodRow, Options, Trained
from afa.evaluation.setup import Setup
from afa.sampling.base import OneEach
from afa.sampling.registry import make_sampler
from afa.sampling.sample import PipelineSampler, Request, Sampler
from afa.training.prompt_router import (
    FILE,
    PromptRouter,
    TextReader,
    router_finished,
    train_prompt_router,
)

NAME = "prompt_router"


def prompt_router_rows(setup: Setup) -> list[MethodRow]:
    """Return the row, trained on the ensemble's images with each training seed."""
    train, sampler = functools.partial(_train, setup), functools.partial(_sampler, setup)
    return [MethodRow(NAME, "control", "prompt router", sampler, train=train, runs=setup.settings.seeds)]


def _folder(setup: Setup, run: int) -> Path:
    return setup.output / "trained" / NAME / f"seed-{run}"


def _train(setup: Setup, options: Options, run: int) -> Trained:
    """Train in one process, or read what was trained before."""
    folder = _folder(setup, run)
    settings = setup.training(folder, run, crops=0, flip=False)
    if PartialState().is_main_process and router_finished(settings) is None:
        train_prompt_router(settings, setup.ensemble, [item.caption for item in setup.protocol.items])
    PartialState().wait_for_everyone()
    record = router_finished(settings)
    assert record is not None
    router = PromptRouter.read(folder)
    parameters = sum(part.numel() for part in (router.centre, router.weights, router.offset))
    note = "images " + ", ".join(f"by {name} {count}" for name, count in record["chosen"].items())
    loss = record["held_out_loss"]["trained"]["value"]
    return Trained(folder, folder / FILE, parameters, 0, record["seconds"], loss, note)


class Routed(OneEach):
    """Draws every image with the expert that a router chooses by its prompt.

    makers: by the experts' names, in the ensemble's order
    """

    def __init__(
        self, makers: dict[str, Callable[[], PipelineSampler]], router: PromptRouter, read: TextReader
    ) -> None:
        super().__init__(makers)
        self.router, self.read = router, read

    def choose(self, requests: Sequence[Request]) -> list[str]:
        experts = list(self.makers)
        states = self.read([request.prompt for request in requests])
        return [experts[place] for place in self.router.choose(states)]


def _sampler(setup: Setup, options: Options, run: int) -> Sampler:
    """Return a sampler of the chosen experts in the comparison's frame."""
    router = PromptRouter.read(_folder(setup, run))  # it was trained by all processes; one alone may score
    makers = {
        name: functools.partial(make_sampler, "single_in_ensemble", setup.ensemble, expert=name)
        for name in setup.names
    }
    return Routed(makers, router, TextReader(setup.ensemble))
