"""The drop-in denoiser of each family."""

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.flux import FluxEnsemble
from afa.denoiser.qwen_image import QwenImageEnsemble
from afa.denoiser.sd3 import SD3Ensemble
from afa.denoiser.unet import UNetEnsemble

DENOISERS: dict[str, type[EnsembleDenoiser]] = {
    "unet": UNetEnsemble,
    "sd3": SD3Ensemble,
    "flux": FluxEnsemble,
    "qwen-image": QwenImageEnsemble,
}
