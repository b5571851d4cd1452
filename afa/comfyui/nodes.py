"""The nodes of ComfyUI: AFA Ensemble, AFA Strength, AFA Encode, AFA Weights.

ComfyUI imports this when it starts, and calls a node's FUNCTION when a workflow reaches it. It says what
UserErrors say beside the node.
"""

import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar

from afa.errors import UserError, unknown

MOST = 8  # experts
MODELS, CLIPS = ([f"{kind}_{place}" for place in range(1, MOST + 1)] for kind in ("model", "clip"))
BY_PATH = "(by path)"  # among the names of folders
FOLDER = "afa"  # of ensembles, in ComfyUI's folder of models
CATEGORY = "afa"
Inputs = dict[str, dict[str, Any]]


def _several(names: list[str], kind: str, help: str) -> Inputs:
    """Return inputs of which two are required."""
    fields = [(kind, {"tooltip": f"{help} {place}"}) for place in range(1, len(names) + 1)]
    made = dict(zip(names, fields, strict=True))
    return {
        "required": {name: made[name] for name in names[:2]},
        "optional": {name: made[name] for name in names[2:]},
    }


def _in_order(given: dict[str, Any], names: list[str], kind: str) -> list[Any]:
    """Return the connected inputs in order. Raises UserError for a gap."""
    found = [given.get(name) for name in names]
    count = sum(one is not None for one in found)
    if any(one is None for one in found[:count]):
        missing = next(name for name, one in zip(names, found, strict=True) if one is None)
        raise UserError(f"{missing} is not connected, but a later {kind} is; connect them without a gap")
    return found[:count]


def ensembles() -> dict[str, Path]:
    """Return the ensembles in ComfyUI's folders of models, by name; none outside of ComfyUI."""
    paths = sys.modules.get("folder_paths")
    if paths is None:
        return {}
    if FOLDER not in paths.folder_names_and_paths:
        paths.add_model_folder_path(FOLDER, str(Path(paths.models_dir) / FOLDER))
    roots = [Path(root) for root in paths.get_folder_paths(FOLDER)]
    files = sorted(file for root in roots if root.is_dir() for file in root.glob("*/afa.json"))
    return {file.parent.name: file.parent for file in files[::-1]}


def _folder(ensemble: str, path: str) -> Path:
    """Return the ensemble's folder; a path may also be a name in models/afa.

    Raises UserError if nothing is chosen, and for a folder that does not exist.
    """
    known = ensembles()
    if ensemble == BY_PATH:
        name = path.strip()
        if not name:
            raise UserError(
                f"no ensemble is chosen; choose one, or give its folder as path (models/{FOLDER} is searched)"
            )
        folder = known.get(name, Path(name).expanduser())
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder.absolute()}, and no ensemble '{name}' in models/{FOLDER}; give "
                "the folder with afa.json as path, or put it there and choose it"
            )
        return folder
    if ensemble not in known:
        raise UserError(unknown(ensemble, [BY_PATH, *known], f"ensemble in models/{FOLDER}"))
    return known[ensemble]


class AfaEnsemble:
    """AFA Ensemble: the MODELs of its experts and its folder become one MODEL."""

    CATEGORY = CATEGORY
    FUNCTION = "combine"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "experts")
    DESCRIPTION = (
        "Combines the experts of a trained ensemble (afa train). Connect one MODEL for each expert, in the "
        "ensemble's order; LoRAs go between loader and this node."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802  # ComfyUI's name
        found = _several(MODELS, "MODEL", "expert")
        found["required"]["ensemble"] = (
            [BY_PATH, *sorted(ensembles())],
            {"tooltip": f"a folder with afa.json in models/{FOLDER}"},
        )
        found["optional"]["path"] = (
            "STRING",
            {
                "default": "",
                "tooltip": f"for {BY_PATH}: the ensemble's folder, or its name in models/{FOLDER}",
            },
        )
        found["optional"]["compare_files"] = (
            "BOOLEAN",
            {
                "default": True,
                "tooltip": "compare the loaded files with those that the ensemble was made with",
            },
        )
        found["hidden"] = {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"}
        return found

    @classmethod
    def IS_CHANGED(cls, ensemble: str, path: str = "", **given: Any) -> str:  # noqa: N802
        """Return what changes with the ensemble's folder: its manifest, which holds all hashes."""
        try:
            return (_folder(ensemble, path) / "afa.json").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls, ensemble: str | None = None, path: str | None = None
    ) -> bool | str:
        """Return True, or what is wrong with the folder, before models are loaded. None: not known yet."""
        from afa.checkpoint.manifest import read_manifest

        if ensemble is not None and (ensemble != BY_PATH or path is not None):
            try:
                read_manifest(_folder(ensemble, path or ""))
            except UserError as error:
                return str(error)
        return True

    def combine(
        self,
        ensemble: str,
        path: str = "",
        compare_files: bool = True,
        prompt: Any = None,
        unique_id: Any = None,
        **given: Any,
    ) -> tuple[Any, str]:
        """Return the ensemble's MODEL, and a line for each expert."""
        from afa.comfyui.experts import combine, provenance

        folder = _folder(ensemble, path)
        models = _in_order(given, MODELS, "MODEL")
        made = combine(models, folder)
        names = made.get_attachment("afa").names
        lines = [f"{place} {name}" for place, name in enumerate(names, start=1)]
        if compare_files and prompt is not None:
            paths = importlib.import_module("folder_paths")
            lines = provenance(prompt, str(unique_id), MODELS[: len(models)], folder, paths)
        return made, "\n".join(lines)


class AfaStrength:
    """AFA Strength: one expert's weights are multiplied, in a part of the picture and of the steps."""

    CATEGORY = CATEGORY
    FUNCTION = "strengthen"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Multiplies the weights of one expert: 0 turns it off, 1 changes nothing. With a mask, inside "
        "the mask alone. Several of these nodes may follow each other."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "of AFA Ensemble"}),
                "expert": ("STRING", {"default": "1", "tooltip": "its name, or its number in the ensemble"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1000.0, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.0, **share}),
                "end_percent": ("FLOAT", {"default": 1.0, **share}),
            },
            "optional": {"mask": ("MASK", {"tooltip": "where the strength holds"})},
        }

    def strengthen(
        self,
        model: Any,
        expert: str,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        mask: Any = None,
    ) -> tuple[Any]:
        """Return a MODEL with one strength more."""
        from afa.comfyui.running import STRENGTHS, ensemble_on
        from afa.denoiser.strengths import Strength
        from afa.settings import WEIGHT, check_interval, check_number

        names = ensemble_on(model).names
        numbers = [str(place) for place in range(1, len(names) + 1)]
        wanted = expert.strip()
        if wanted not in (*names, *numbers):
            raise UserError(unknown(wanted, [*names, *numbers], "expert of this ensemble"))
        place = names.index(wanted) if wanted in names else int(wanted) - 1
        check_number(strength, f"the strength of expert '{names[place]}' is", **WEIGHT)
        check_interval((start_percent, end_percent), "start_percent,end_percent")
        if mask is not None:
            mask = mask.reshape(-1, *mask.shape[-2:])
        made = model.clone()
        options = made.model_options["transformer_options"]
        added = Strength(names[place], float(strength), mask, start_percent, end_percent)
        options[STRENGTHS] = (*options.get(STRENGTHS, ()), added)
        return (made,)


class AfaEncode:
    """AFA Encode: one prompt, read by the text encoder of every expert."""

    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    DESCRIPTION = (
        "Encodes a prompt with the CLIP of every expert, in the ensemble's order. Not needed where the "
        "experts share one text encoder: use CLIP Text Encode."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        found = _several(CLIPS, "CLIP", "of expert")
        found["required"]["text"] = ("STRING", {"multiline": True, "dynamicPrompts": True})
        return found

    def encode(self, text: str, **given: Any) -> tuple[Any]:
        """Return a CONDITIONING that holds the states of each expert."""
        from afa.comfyui.texts import joined

        clips = _in_order(given, CLIPS, "CLIP")
        read = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for clip in clips]
        return (joined(read, importlib.import_module("comfy.conds")),)


class AfaWeights:
    """AFA Weights: which expert weighed where, in the sampling that made these latents."""

    CATEGORY = CATEGORY
    FUNCTION = "show"
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("maps", "overlay", "shares")
    DESCRIPTION = (
        "Shows the weights of a sampling, the mean over its steps: a picture for each expert (white: 0, full "
        "colour: 1), all experts' colours over the picture, and each expert's share."
    )
    ALL: ClassVar[str] = "all"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "of AFA Ensemble, as the sampler had it"}),
                "samples": ("LATENT", {"tooltip": "of the sampler"}),
                "stage": (
                    "STRING",
                    {"default": cls.ALL, "tooltip": "all: the mean over stages; or OUT11, M00 …"},
                ),
            },
            "optional": {"image": ("IMAGE", {"tooltip": "the decoded picture, to lay the colours over"})},
        }

    def show(
        self, model: Any, samples: dict[str, Any], stage: str = ALL, image: Any = None
    ) -> tuple[Any, Any, str]:
        """Return the maps (B·N, H, W, 3), the overlay (B, H, W, 3), and a line for each expert."""
        from afa.comfyui.maps import drawn, means_of
        from afa.comfyui.running import ensemble_on

        ensemble = ensemble_on(model)
        weights = means_of(ensemble, samples["samples"], stage.strip(), self.ALL)
        maps, overlay = drawn(weights, image)
        shares = weights.mean((0, 2, 3)).tolist()
        lines = [f"{name} {share:.3f}" for name, share in zip(ensemble.names, shares, strict=True)]
        return maps, overlay, "\n".join(lines)


NODE_CLASS_MAPPINGS = {
    "AfaEnsemble": AfaEnsemble,
    "AfaStrength": AfaStrength,
    "AfaEncode": AfaEncode,
    "AfaWeights": AfaWeights,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AfaEnsemble": "AFA Ensemble",
    "AfaStrength": "AFA Strength",
    "AfaEncode": "AFA Encode",
    "AfaWeights": "AFA Weights",
}
