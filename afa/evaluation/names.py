"""The methods of a comparison, by name."""

from collections.abc import Sequence

from afa.errors import UserError, unknown
from afa.merging.registry import MERGES
from afa.sampling.registry import SAMPLING_METHODS

TRAINED = {
    "finetune_best": "a LoRA on the best expert, trained as the ensemble was: equal parameters, equal steps",
    "finetune_best_compute": "the same at equal compute",
    "finetune_merge": "a LoRA on the weighted merge: equal parameters, equal steps",
    "finetune_merge_compute": "the same at equal compute",
    "merge_and_continue": (
        "the weighted merge, trained by a LoRA, merged with the experts again, trained again: equal compute"
    ),
    "prompt_router": "one expert for each prompt, by a linear model of their losses on the training images",
    "prediction_router": "one trained aggregator on the experts' predictions, nothing else fused",
    "afa": "the ensemble",
    "afa_shared": "the ensemble, with the weights of the pass with the prompt for both passes of guidance",
    "distilled": "one model that was trained on the ensemble's answers (afa distill)",
    "distilled_lora": "the same as a LoRA on the weighted merge, of as many parameters as the aggregators",
    "distilled_guided": "the same with guidance in its one pass: half of the price of one model",
    "best_of_n": (
        "the best of the single experts image by image, known only afterwards: an upper bound for choosing"
        " one"
    ),
}
ALWAYS = ("single", "afa")  # all other methods are compared with these


def known_methods() -> dict[str, str]:
    """Return every method and what it is: single experts, merges, sampling-time methods, what is trained."""
    merged: dict[str, str] = {}
    for name, merge in MERGES.items():
        merged[name] = merge.row
        if merge.by_stage:
            merged["auto_mbw"] = "the same with weights searched for by score"
    alone = {name: method.row for name, method in SAMPLING_METHODS.items() if method.each}
    sampled = {name: method.row for name, method in SAMPLING_METHODS.items() if not method.each}
    return {**alone, **merged, **sampled, **TRAINED}


def chosen_methods(given: Sequence[str]) -> tuple[str, ...]:
    """Return the methods that the user asked for and those of ALWAYS, in the order of the table.

    Raises UserError for others.
    """
    known = known_methods()
    for name in given:
        if name != "all" and name not in known:
            raise UserError(unknown(name, known, "method"))
    return tuple(name for name in known if "all" in given or name in given or name in ALWAYS)
