"""Patches of ComfyUI's models: which work in an ensemble, and for which expert.

A patch that a MODEL had when it entered the ensemble is its own; one that is put on the ensemble is for all.
"""

from collections.abc import Mapping
from typing import Any

from afa.comfyui.network import Options
from afa.errors import UserError

# what blocks read from their options themselves: it works wherever a block runs
IN_BLOCKS = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch")
REPLACED_IN_BLOCKS = ("attn1", "attn2")
# what the network's own forward would do, by the nodes that do it
KNOWN = {
    "output_block_patch": "FreeU, Kohya Deep Shrink",
    "input_block_patch": "Kohya Deep Shrink, T2I-style patches",
    "input_block_patch_after_skip": "Kohya Deep Shrink",
    "middle_patch": "GLIGEN",
    "emb_patch": "time embedding",
    "post_input": "USO, other image conditions",
    "dit": "blocks replaced, such as Skip Layer Guidance",
}


def check_patches(options: Mapping[str, Any], where: str) -> None:
    """Raise UserError, naming the patch, for one that an ensemble's loop over stages would leave out.

    options: transformer_options
    where:   for the message
    """
    for kind, allowed in (("patches", IN_BLOCKS), ("patches_replace", REPLACED_IN_BLOCKS)):
        for name, found in options.get(kind, {}).items():
            if found and name not in allowed:
                node = f" ({KNOWN[name]})" if name in KNOWN else ""
                raise UserError(
                    f"{where} has the patch {name}{node}, and an ensemble does not run it; "
                    "take that node out of the way from the loader to the sampler"
                )


def options_of_expert(runtime: Options, first: Options, own: Options) -> Options:
    """Return what an expert's blocks get as transformer_options.

    runtime: of this pass; it holds the patches of the first MODEL, and those put on the ensemble
    first:   of the first MODEL when it entered the ensemble
    own:     of this expert's MODEL when it entered
    """
    patches, replaced = dict(own.get("patches", {})), dict(own.get("patches_replace", {}))
    for name, found in runtime.get("patches", {}).items():
        added = found[len(first.get("patches", {}).get(name, ())) :]  # nodes put theirs at the end
        if added:
            patches[name] = [*patches.get(name, ()), *added]
    for name, found in runtime.get("patches_replace", {}).items():
        before = first.get("patches_replace", {}).get(name, {})
        added = {place: function for place, function in found.items() if place not in before}
        if added:
            replaced[name] = replaced.get(name, {}) | added
    return {**runtime, "patches": patches, "patches_replace": replaced}


def left_out(patcher: Any) -> list[str]:
    """Return what a MODEL that is not the ensemble's first has, and what only the first one's is used of."""
    names = [name for name, value in patcher.model_options.items() if name != "transformer_options" and value]
    wrappers = [kind for kind, by_key in patcher.wrappers.items() if any(by_key.values())]
    return names + [f"{kind} wrapper" for kind in wrappers]
