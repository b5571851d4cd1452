"""The registry of objectives. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveEntry:
    """One objective of training; several are summed: mse+reward.

    make:      "module:function" with function(ObjectiveContext) -> Objective; imported when it is asked for
    help:      what it is, for `--objective`
    rewarded:  whether it judges images: then it needs --reward, and its weight is --reward-weight, else 1
    diffusion: whether it is the diffusion loss, which every measurement on held-out images has anyway
    """

    make: str
    help: str
    rewarded: bool = False
    diffusion: bool = False


PLAIN = "mse"  # the objective where none is chosen
OBJECTIVES: dict[str, ObjectiveEntry] = {
    PLAIN: ObjectiveEntry("afa.training.objectives:make_mse", "the diffusion loss", diffusion=True),
    "reward": ObjectiveEntry(
        "afa.training.reward_objectives:make_direct_align", "by one-step recovery", rewarded=True
    ),
    "draft": ObjectiveEntry("afa.training.reward_objectives:make_draft", "through sampling", rewarded=True),
}
