"""The methods of a comparison, by name."""

from collections.abc import Sequence

from afa.errors import UserError, unknown

METHODS: dict[str, str] = {
    "single": "each expert alone, as the pipeline it came as",
    "single_in_ensemble": "each expert alone in the ensemble's frame (its VAE, text encoders and scheduler): the control for the frame",
    "weighted": "one model of averaged weights",
    "mbw": "one model, weights averaged stage by stage along the community's presets",
    "auto_mbw": "the same with weights searched for by score",
    "add_difference": "the best expert plus what the second learnt",
    "task_arithmetic": "the base plus what all experts learnt",
    "ties": "the same, trimmed and with elected signs",
    "dare": "the same, differences dropped at random",
    "model_stock": "the mean of the experts, drawn back to the base",
    "slerp": "the two best experts, interpolated on the sphere",
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


def chosen_methods(given: Sequence[str]) -> tuple[str, ...]:
    """The methods that were asked for, in the table's order, with what they are compared with. Raises UserError for others."""
    for name in given:
        if name != "all" and name not in METHODS:
            raise UserError(unknown(name, METHODS, "method"))
    return tuple(name for name in METHODS if "all" in given or name in given or name in ALWAYS)
