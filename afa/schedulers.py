"""Schedulers by the names people use, and from a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa.denoiser.schedule import FLOW, Schedule, flow_config, kind_of
from afa.errors import UserError, look_up
from afa.experts.parts import load_scheduler

# name on the command line -> diffusers class and what is set besides the experts' own noise schedule
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


# The same for flows. Other flow schedulers of diffusers are left out: some add noise in every step, and
# pipelines of flows give them no generator per image; DEIS divides by the signal, which is 0 at the start.
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_scheduler(name: str, like: Any) -> Any:
    """Make the scheduler of that name with the noise schedule and prediction type of another.

    name: see SCHEDULERS and FLOWS
    like: a diffusers scheduler
    Raises UserError for an unknown name, and for a scheduler that does not support this kind of model or
    this noise schedule.
    """
    flows = kind_of(like) == FLOW
    try:
        kind, options = look_up(name, FLOWS if flows else SCHEDULERS, "scheduler")
    except ValueError as error:
        raise UserError(_not_for_flows(name) if flows and name in SCHEDULERS else str(error)) from None
    if flows:
        return _flow(kind, like)
    wanted = Schedule.of(like)
    made = _maker(kind).from_config(like.config, **options)
    if not Schedule.of(made).same_noise(wanted):
        zero_snr = "ends at zero terminal SNR (rescale_betas_zero_snr)"
        raise UserError(
            f"scheduler '{name}' cannot have the experts' noise schedule, "
            f"which {zero_snr if wanted.zero_snr else 'is not one of betas'}; "
            "choose another, such as ddim, euler or dpm++"
        )
    return made


def reschedule(ensemble: Any, name: str) -> None:
    """Replace the scheduler of an ensemble's frame, and of every expert's own pipeline.

    Raises UserError if it does not support all of them.
    """
    ensemble.frame.scheduler = make_scheduler(name, ensemble.frame.scheduler)
    for expert in ensemble.experts:
        try:
            expert.scheduler = make_scheduler(name, expert.scheduler)
        except UserError as error:
            raise UserError(f"expert '{expert.name}': {error}") from None


def _not_for_flows(name: str) -> str:
    return (
        f"scheduler '{name}' is for models with a diffusion schedule, and these are flow models; "
        f"choose one of {', '.join(FLOWS)}"
    )


def _flow(kind: str, like: Any) -> Any:
    """Make a flow scheduler with the shift of another."""
    config, shift = flow_config(like)
    if kind.startswith("FlowMatch"):
        return _maker(kind).from_config(config, shift=shift)
    return _static(_maker(kind)).from_config(
        config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def _maker(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind)


def _static(maker: Any) -> Any:
    """Return a subclass of a scheduler that ignores `mu` (the image size) unless it uses dynamic shifting.

    FLUX's pipeline always passes mu, and diffusers' general schedulers refuse it. The pipelines of Qwen-Image
    and Krea 2 also pass evenly spaced sigmas; these schedulers make the same ones of the number of steps.
    """

    class Static(maker):  # type: ignore[misc]
        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: Any = None,
            mu: float | None = None,
            sigmas: Sequence[float] | None = None,
            **kwargs: Any,
        ) -> None:
            if sigmas is not None:
                num_inference_steps = len(sigmas)
                if not np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas))):
                    raise UserError(
                        f"sigmas of one's own are not taken by {maker.__name__}; leave them out, "
                        "or choose the scheduler euler"
                    )
            dynamic = {"mu": mu} if self.config.use_dynamic_shifting else {}
            super().set_timesteps(num_inference_steps, device, **dynamic, **kwargs)

    Static.__name__ = Static.__qualname__ = maker.__name__
    return Static


def read_scheduler(folder: Path) -> Any:
    """Read the scheduler of a diffusers folder or of its sub-folder `scheduler`.

    Raises UserError if missing.
    """
    if (folder / "scheduler").is_dir():
        folder = folder / "scheduler"
    if not (folder / "scheduler_config.json").is_file():
        raise UserError(f"{folder} has no scheduler_config.json")
    return load_scheduler(folder)
