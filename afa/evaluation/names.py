"""The methods of a comparison, by name."""

from collections.abc import Sequence

from afa.errors import UserError, unknown
from afa.merging.registry import MERGES

BEFORE = {
    "single": "each expert alone, as the pipeline it came as",
    "single_in_ensemble": "each expert alone in the ensemble's frame (its VAE, text encoders and scheduler): the control for the frame",
}
SEARCHED = {"auto_mbw": "the same with weights searched for by score"}  # stands after mbw
AFTER = {
    "random_expert": "one expert an image, drawn by its seed",
    "noise_average": "the experts' predictions, averaged",
    "feature_mean": "the untrained ensemble: the experts' features, averaged at every stage",
    "timestep_experts": "each expert in its own range of timesteps",
    "magicfusion": "saliency decides, pixel by pixel, whose prediction counts",
    "superdiff_or": "superposed densities: what any expert would draw",
    "superdiff_and": "superposed densities: what all experts would draw",
    "finetune_best": "a LoRA on the best expert, trained as the ensemble was: equal parameters, equal steps",
    "finetune_best_compute": "the same at equal compute",
    "finetune_merge": "a LoRA on the weighted merge: equal parameters, equal steps",
    "finetune_merge_compute": "the same at equal compute",
    "prediction_router": "one trained aggregator on the experts' predictions, nothing else fused",
    "afa": "the ensemble",
    "best_of_n": "the best of the single experts image by image, known only afterwards: an upper bound for choosing one",
}
ALWAYS = ("single", "afa")  # what everything else is compared with


def known_methods() -> dict[str, str]:
    """Every method of comparisons and what it is, in the order of the table; the merges are the registry's."""
    merges = [(name, merge.row) for name, merge in MERGES.items()]
    place = 1 + [name for name, _ in merges].index("mbw")
    return {**BEFORE, **dict(merges[:place]), **SEARCHED, **dict(merges[place:]), **AFTER}


def chosen_methods(given: Sequence[str]) -> tuple[str, ...]:
    """The methods that were asked for, in the table's order, with what they are compared with. Raises UserError for others."""
    known = known_methods()
    for name in given:
        if name != "all" and name not in known:
            raise UserError(unknown(name, known, "method"))
    return tuple(name for name in known if "all" in given or name in given or name in ALWAYS)
