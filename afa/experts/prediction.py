"""The kind of prediction and the noise of a U-Net, by its single file or its user.

A single file has no scheduler_config.json. The usual scheduler of its architecture is changed by the first of
1. two empty tensors, as ComfyUI reads and writes them: `v_pred` (v-prediction), and with it `ztsnr` (zero
   terminal SNR);
2. `modelspec.prediction_type` in its header: epsilon or v;
3. the user's --prediction-type;
4. a folder of configs that the user names.
If two contradict each other, an error shows both values.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from afa.denoiser.schedule import Schedule, kind_of
from afa.errors import UserError
from afa.experts.headers import read_file, read_metadata
from afa.experts.layouts import DENOISER
from afa.experts.locate import Located
from afa.experts.parts import has_part, load_part

V, EPSILON = "v_prediction", "epsilon"
V_KEY, ZERO_KEY = "v_pred", "ztsnr"
MODELSPEC = "modelspec.prediction_type"
SPELLINGS = {"epsilon": EPSILON, "eps": EPSILON, "v": V, "v_prediction": V, "v-prediction": V}
# Empty or small tensors by which ComfyUI knows models of EDM's noise: Playground v2.5, CosXL.
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@dataclass(frozen=True)
class Prediction:
    """What a file or a user says about the kind of prediction.

    type:     epsilon or v_prediction; None: nothing is said
    zero_snr: whether the noise schedule ends without signal (zero terminal SNR)
    """

    type: str | None = None
    zero_snr: bool = False


def said_by_file(file: Path, given: str | None = None, config: str | None = None) -> Prediction:
    """The kind of prediction of a U-Net's single file.

    given:  the user's --prediction-type
    config: the prediction type of the scheduler in a folder of configs that the user names; the file's own
            keys and the user count more
    Raises UserError if two contradict each other, and for models of EDM's noise schedule.
    """
    names = read_file(file)
    edm = next((name for name in EDM_KEYS if _has(names, name)), None)
    if edm is not None:
        raise UserError(
            f"{file} is a model of EDM's noise schedule ('{edm}', as Playground v2.5 and CosXL have it), "
            "which is not read as a single file"
        )
    key = V if _has(names, V_KEY) else None
    text = read_metadata(file).get(MODELSPEC, "").strip().lower()
    header = SPELLINGS.get(text)
    if text and header is None and not (key or given):
        raise UserError(
            f"{file}: its header says {MODELSPEC} '{text:.40}', expected epsilon or v; "
            "say which with --prediction-type"
        )
    said = {f"its key {V_KEY}": key, "--prediction-type": given}
    if not all(said.values()):
        said[f"its header ({MODELSPEC})"] = header
    if not any((key, given)):
        said["the scheduler of its config"] = config
    found = {who: what for who, what in said.items() if what}
    if len(set(found.values())) > 1:
        both = ", ".join(f"{who} says {what}" for who, what in found.items())
        raise UserError(f"{file}: {both}; correct one of them, or say which is right with --prediction-type")
    return Prediction(next(iter(found.values()), None), _has(names, ZERO_KEY))


def predicting(scheduler: Any, said: Prediction, where: object) -> Any:
    """A scheduler for a kind of prediction; the same object if nothing changes.

    With zero terminal SNR its steps begin at the end of the schedule. Zero terminal SNR without v-prediction
    is ignored with a warning, as in ComfyUI.

    said:  what the file or the user says
    where: the expert, for messages
    Raises UserError for a scheduler of a flow model. Source: arXiv:2305.08891, sections 3.1 and 3.3.
    """
    kind = kind_of(scheduler)
    if said.type is not None and kind not in SPELLINGS.values():
        raise UserError(
            f"{where} predicts {kind} by its scheduler, and {said.type} was said of it; "
            "leave out --prediction-type"
        )
    wanted = said.type or kind
    if said.zero_snr and wanted != V:
        warn_once(
            f"{where}: its key {ZERO_KEY} is ignored, since it predicts {wanted}; if it predicts v, "
            f"give --prediction-type {V}"
        )
    zero = said.zero_snr and wanted == V and not Schedule.of(scheduler).zero_snr
    if not zero:
        return (
            scheduler
            if wanted == kind
            else type(scheduler).from_config(scheduler.config, prediction_type=wanted)
        )
    changes = {"prediction_type": wanted, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    made = type(scheduler).from_config(scheduler.config, **changes)
    if Schedule.of(made).zero_snr:
        return made
    from diffusers import DDIMScheduler  # for classes without this setting, such as the PNDM of SD 1.x

    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False, **changes)


def folder_scheduler(located: Located, index: dict[str, Any]) -> Any:
    """The scheduler of a pipeline's folder; None if it has none.

    index: the content of its model_index.json
    Raises UserError if the user's --prediction-type is another than the scheduler's.
    """
    scheduler = load_part(located.path, "scheduler") if has_part(index, "scheduler") else None
    given = located.spec.prediction_type
    if scheduler is not None and given not in (None, kind_of(scheduler)):
        raise UserError(
            f"{located.path}: its scheduler says {kind_of(scheduler)}, --prediction-type {given}; "
            "leave out one, or correct the folder"
        )
    return scheduler


def flow_only(located: Located) -> Prediction:
    """The empty Prediction of a flow model. Raises UserError if the user gave --prediction-type."""
    if located.spec.prediction_type is not None:
        raise UserError(
            f"{located.path} is a flow model, which predicts neither epsilon nor v; "
            f"leave out --prediction-type {located.spec.prediction_type}"
        )
    return Prediction()


def keys_of(scheduler: Any) -> tuple[str, ...]:
    """The names of the empty tensors by which a U-Net's single file says what its scheduler says."""
    if scheduler is None or kind_of(scheduler) != V:
        return ()
    return (V_KEY, ZERO_KEY) if Schedule.of(scheduler).zero_snr else (V_KEY,)


def is_prediction_key(name: str) -> bool:
    """Whether a tensor of a single file is one of those empty ones, and no weight."""
    return name.removeprefix(DENOISER) in (V_KEY, ZERO_KEY)


def _has(names: Collection[str], key: str) -> bool:
    return key in names or DENOISER + key in names


@lru_cache
def warn_once(sentence: str) -> None:
    """Print a warning on stderr; the same one only once."""
    print(f"afa: {sentence}", file=sys.stderr)
