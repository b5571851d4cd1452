"""The registry of objectives. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveEntry:
    """One objective of training; several are summed: mse+reward.

    make:     "module:function" with function(Means) -> Objective; imported when it is asked for
    help:     what it is, for `--objective`
    rewarded: whether it judges images: it needs --reward, and --reward-weight is what it counts; others count
              1
    """

    make: str
    help: str
    rewarded: bool = False


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "mse": ObjectiveEntry("afa.training.objectives:make_mse", "the diffusion loss"),
    "reward": ObjectiveEntry(
        "afa.training.reward_objectives:make_direct_align", "by one-step recovery", rewarded=True
    ),
    "draft": ObjectiveEntry("afa.training.reward_objectives:make_draft", "through sampling", rewarded=True),
}
