"""`anchor`: the squared distance to what the denoiser predicted when the run began, so that a reward cannot carry it away."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from afa.training.objectives.base import Objective, Pass


class Anchor(Objective):
    """Of the prediction to that with the first weights of what is trained: an untrained ensemble, or the one it starts from."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.first = [parameter.detach().clone() for parameter in self.parameters]

    def loss(self, work: Pass) -> Tensor:
        prediction = work.prediction
        with torch.no_grad(), self._back():
            before = work.predict(work.denoiser, work.noisy, work.noising.told(work.batch.steps), work.conditions)
        return (prediction - before).square().mean((1, 2, 3))

    @contextmanager
    def _back(self) -> Iterator[None]:
        """Inside, the parameters are what they were at first."""
        now = [parameter.data for parameter in self.parameters]
        for parameter, first in zip(self.parameters, self.first, strict=True):
            parameter.data = first
        try:
            yield
        finally:
            for parameter, current in zip(self.parameters, now, strict=True):
                parameter.data = current
