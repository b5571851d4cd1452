"""The options of objectives."""

from dataclasses import dataclass

from afa.errors import UserError, unknown
from afa.metrics.registry import rewards
from afa.settings import COUNT, GUIDANCE, SAMPLING_STEPS, WEIGHT, CheckedOptions, option
from afa.training.objective_registry import OBJECTIVES, PLAIN

LISTED = ", ".join(f"{name} ({entry.help})" for name, entry in OBJECTIVES.items())


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(CheckedOptions):
    """The objective, field by field a flag of every command that trains."""

    objective: str = option(
        PLAIN,
        help=f"{LISTED}, or a sum: mse+reward",
    )
    snr_gamma: float | None = option(
        None,
        above=0,
        most=10**6,
        help="γ of min-SNR-γ weighting of mse, 5 as published (default: all timesteps have the same weight)",
    )
    weighting: str | None = option(
        None,
        help="SD3's weighting of mse, for flow matching (default: none)",
        choices=["sigma_sqrt", "cosmap"],
    )
    timesteps: str = option(
        "uniform", help="how the timesteps of a step are drawn", choices=["uniform", "logit_normal", "mode"]
    )
    timestep_range: list[int] | None = option(
        None,
        least=0,
        most=10**6,
        help="two timesteps, both included, between which those of a step are drawn, e.g. 500 999 for much "
        "noise; held-out images are measured at all (default: all)",
    )
    band_weights: list[float] | None = option(
        None,
        **WEIGHT,
        help="weights of mse in equal bands of timesteps, from little noise to much, e.g. 0 1 1 2; they are "
        "divided by their mean (default: the same weight everywhere)",
    )
    reward: str | None = option(
        None,
        help=f"{', '.join(rewards())}, or a Python file with reward(images, captions)",
    )
    reward_weights: str | None = option(None, help="where the reward's weights are (default: the hub)")
    reward_weight: float = option(
        0.1, **WEIGHT, help="weight of reward or draft in the sum; mse has weight 1"
    )
    reward_reach: float = option(
        0.5,
        above=0,
        most=1,
        help="for reward: how far the recovered step goes towards the clean image, above 0, at most 1",
    )
    better: str | None = option(
        None, help="words before the caption whose reward is added, e.g. 'detailed photo'"
    )
    worse: str | None = option(
        None, help="words before the caption whose reward is subtracted, e.g. 'blurry'"
    )
    draft_steps: int = option(20, **SAMPLING_STEPS, help="for draft: number of sampling steps")
    draft_last: int = option(
        1, **SAMPLING_STEPS, help="for draft: number of last sampling steps that have gradients"
    )
    draft_again: int = option(
        0, least=0, most=1000, help="for draft: repetitions of the last step from new noise (DRaFT-LV)"
    )
    draft_guidance: float | None = option(
        None, **GUIDANCE, help="for draft: strength of classifier-free guidance (default: the family's own)"
    )
    anchor: float = option(
        0.0,
        **WEIGHT,
        help="weight of the squared distance to other predictions, see --anchor-to",
    )
    anchor_to: str = option(
        "start",
        help="those that the run began with, or the mean of the experts' own, which takes one more forward "
        "pass for each",
        choices=["start", "mean"],
    )
    sparsity: float = option(
        0.0,
        **WEIGHT,
        help="weight of the entropy of the experts' weights; fewer experts are then used at each place",
    )
    sparsity_top: int | None = option(
        None, **COUNT, help="replaces the entropy by the weight outside this number of experts"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.objective.split("+")
        for name in names:
            if name not in OBJECTIVES:
                raise UserError(
                    f"--objective {self.objective}: {unknown(name, OBJECTIVES, 'objective')}, joined by +"
                )
        if len(set(names)) < len(names):
            raise UserError(f"--objective {self.objective} names one objective twice; use --reward-weight")
        if self.rewarded and self.reward is None:
            raise UserError(
                f"--objective {self.objective} needs --reward, the judge whose gradient is followed"
            )
        if self.reward is not None and not self.rewarded:
            raise UserError(
                f"--reward {self.reward} is not used by --objective {self.objective}; use --objective"
                " mse+reward"
            )
        if self.snr_gamma is not None and self.weighting is not None:
            raise UserError(
                f"--snr-gamma {self.snr_gamma} and --weighting {self.weighting} weigh the same loss; give one"
            )
        self._check_timesteps()
        if self.anchor_to != "start" and not self.anchor:
            raise UserError(
                f"--anchor-to {self.anchor_to} says what --anchor holds to; give its weight, e.g."
                " --anchor 0.1"
            )
        if self.sparsity_top is not None and not self.sparsity:
            raise UserError(
                f"--sparsity-top {self.sparsity_top} says what --sparsity counts; give its weight, e.g."
                " --sparsity 0.01"
            )

    def _check_timesteps(self) -> None:
        """Raise UserError for a range that is none, and for bands that all weigh nothing."""
        bounds = self.timestep_range
        if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
            raise UserError(
                f"--timestep-range {' '.join(map(str, bounds))} is no range; give its first and its last "
                "timestep, e.g. 500 999"
            )
        if self.band_weights is not None and not any(self.band_weights):
            raise UserError(
                f"--band-weights {' '.join(f'{weight:g}' for weight in self.band_weights)} leave nothing to "
                "learn; give at least one above 0"
            )

    @property
    def objectives(self) -> list[str]:
        return self.objective.split("+")

    @property
    def rewarded(self) -> bool:
        """Whether images are judged."""
        return any(OBJECTIVES[name].rewarded for name in self.objectives)
