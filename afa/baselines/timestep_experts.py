"""One expert at a time, by intervals of timesteps, as in eDiff-I (arXiv:2211.01324)."""

from collections.abc import Sequence

from torch import Tensor

from afa.baselines.combination import Combination, Predict
from afa.baselines.intervals import Interval, at, equal_intervals, read_table
from afa.baselines.options import TimestepExperts
from afa.baselines.sampler import PipelineSampler, in_frame
from afa.denoiser.base import EnsembleDenoiser
from afa.ensemble import Ensemble


class ByTimestep(Combination):
    """At every step the expert of its interval; the others are not run."""

    def __init__(self, denoiser: EnsembleDenoiser, intervals: Sequence[Interval]) -> None:
        super().__init__(denoiser)
        self.intervals = list(intervals)

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        expert = self.names.index(at(self.intervals, timestep).expert)
        return predict(expert), self.one_hot(expert)


def timestep_experts(ensemble: Ensemble, options: TimestepExperts) -> PipelineSampler:
    """Experts for intervals of noise levels: arXiv:2211.01324, section 4.

    Deviation: there experts are trained for their intervals; here they are what they are. Raises UserError for a table
    with gaps or overlaps.
    """
    steps = ensemble.frame.scheduler.config.num_train_timesteps
    table = options.table
    intervals = equal_intervals(ensemble.names, steps) if table is None else read_table(table, ensemble.names, steps)
    return PipelineSampler(in_frame(ensemble, ByTimestep(ensemble.denoiser, intervals)))
