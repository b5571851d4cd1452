"""Classifier-free guidance in an interval of the steps; the other steps predict only with the prompt.

Source: Kynkäänniemi et al., arXiv:2404.07724. Deviation: the interval is one of steps, not of noise levels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from afa.denoiser.guidance import not_shared
from afa.denoiser.schedule import share_of_steps
from afa.errors import UserError
from afa.models.registry import denoiser_of, interface_of
from afa.settings import Interval, check_interval
from afa.stages.interface import ModelInterface


@contextmanager
def guided_within(pipeline: Any, interval: Interval | None) -> Iterator[Any]:
    """Inside the context, a stock pipeline applies guidance only in an interval of the steps.

    In the other steps its denoiser runs only the half of the batch that has the prompt, and answers with it
    twice: guidance of any strength then changes nothing.

    pipeline: of an ensemble or of one model
    interval: None: in all steps
    Yields the pipeline. Raises UserError where pipelines do not predict with and without the prompt in one
    pass.
    """
    if interval is None:
        yield pipeline
        return
    check_interval(interval, "guidance interval")
    interface, config = interface_of(pipeline)
    reason = interface.why_no_batched_guidance(config)
    if reason:
        raise UserError(
            f"guidance can be left out of some steps only where one pass makes both predictions, and {reason}"
        )
    denoiser = denoiser_of(pipeline)
    before, whole = denoiser.__dict__.get("forward"), denoiser.forward  # a hook of diffusers may stand there

    def within(timestep: Tensor | float | int) -> bool:
        return interval[0] <= share_of_steps(pipeline.scheduler, timestep) < interval[1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs[interface.latents_input]
        given = args[1] if len(args) > 1 else kwargs[interface.timestep_input]
        timestep = interface.timestep_from_model(given)
        if not pipeline.do_classifier_free_guidance or within(timestep):
            return whole(*args, **kwargs)
        of_lists = isinstance(latents, list)  # the model takes and returns a list with an entry for each row

        def is_leaf(part: Any) -> bool:
            return of_lists and isinstance(part, list)

        prompted = partial(_prompted, interface, len(latents))
        own_args, own_kwargs = tree_map(prompted, (args, kwargs), is_leaf=is_leaf)
        with not_shared(denoiser):  # this half is no batch of guidance
            answer = whole(*own_args, **own_kwargs)
        return tree_map(_twice, answer, is_leaf=is_leaf)

    denoiser.forward = forward
    try:
        yield pipeline
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


def _prompted(interface: ModelInterface, batch: int, value: Any) -> Any:
    """Return the half with the prompt of what has a row for each latent; anything else as it is."""
    has_rows = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
    return interface.split_guidance(value)[1] if has_rows and len(value) == batch else value


def _twice(found: Any) -> Any:
    return found + found if isinstance(found, list) else torch.cat([found, found])
