"""The text of several experts in one CONDITIONING of ComfyUI, and what of it each expert gets in a pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa.comfyui.network import Call
from afa.errors import UserError

TEXT, POOLED = "afa_text_", "afa_pooled_"  # and the expert's place: names of arguments of the network
REPAIR = "change the prompt before AFA Encode, or connect each expert's CLIP to an AFA Encode of its own text"


def joined(conditionings: Sequence[list[Any]], conds: Any) -> list[Any]:
    """Join the CONDITIONINGs of one prompt by several CLIPs: the first one, which carries all states.

    conditionings: of each expert's CLIP, in the ensemble's order
    conds:         ComfyUI's module comfy.conds
    Raises UserError if they do not fit each other.
    """
    first = conditionings[0]
    if any(len(other) != len(first) for other in conditionings):
        raise UserError(
            f"the CLIPs give {', '.join(str(len(one)) for one in conditionings)} parts of a schedule; "
            "give AFA Encode CLIPs without hooks"
        )
    found = []
    for parts in zip(*conditionings, strict=True):
        lengths = {states.shape[1] for states, _ in parts}
        if len(lengths) > 1:
            raise UserError(
                f"the CLIPs read the prompt as {', '.join(map(str, sorted(lengths)))} tokens; "
                "take CLIPs of one kind"
            )
        carried = dict(parts[0][1].get("model_conds", {}))
        for place, (states, settings) in enumerate(parts):
            carried[f"{TEXT}{place}"] = conds.CONDCrossAttn(states)
            if settings.get("pooled_output") is not None:
                carried[f"{POOLED}{place}"] = conds.CONDRegular(settings["pooled_output"])
        found.append([parts[0][0], {**parts[0][1], "model_conds": carried}])
    return found


def calls_of_experts(call: Call, experts: int) -> list[dict[str, Any]]:
    """Return the arguments that each expert's forward would have.

    call:    of the network: context (B, T, D), y (B, P) or None, and what AFA Encode adds
    experts: their number
    Raises UserError for the states of another number of experts, and for states that were changed since.
    """
    shared = {name: value for name, value in call.items() if not name.startswith((TEXT, POOLED))}
    places = [name for name in call if name.startswith(TEXT)]
    if not places:
        return [shared] * experts
    if len(places) != experts:
        raise UserError(
            f"AFA Encode has {len(places)} CLIPs, the ensemble has {experts} experts; connect one for each, "
            "or encode the prompt with one CLIP for all (CLIP Text Encode)"
        )
    label = shared.get("y")
    if not torch.equal(call[f"{TEXT}0"], shared["context"]):
        raise UserError(
            "the text was changed after AFA Encode (Conditioning Average, Concat, Zero Out …), "
            f"which changes the first expert's states alone; {REPAIR}"
        )
    return [
        {**shared, "context": call[f"{TEXT}{place}"], "y": _label(label, call.get(f"{POOLED}{place}"))}
        for place in range(experts)
    ]


def _label(label: Tensor | None, pooled: Tensor | None) -> Tensor | None:
    """Return the vector of an expert: its own pooled text, and after it what all share (SDXL's sizes)."""
    if label is None or pooled is None:
        return label
    return torch.cat([pooled.to(label), label[:, pooled.shape[1] :]], dim=1)
