"""ControlNets of SD3 and FLUX in their stock pipelines, and what is refused by name beside them."""

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from test_lora_sharing import latents
from test_pipeline import picture
from tiny_loras import FAMILIES
from tiny_transformers import FLUX, SD3, lively

from afa import Ensemble, only_expert

NETS = {
    "sd3": (
        StableDiffusion3ControlNetPipeline,
        SD3MultiControlNetModel,
        lambda seed: lively(SD3ControlNetModel, seed, **{**SD3, "num_layers": 2, "dual_attention_layers": (), "qk_norm": None}),
    ),
    "flux": (
        FluxControlNetPipeline,
        FluxMultiControlNetModel,
        lambda seed: lively(FluxControlNetModel, seed, **{**FLUX, "num_layers": 1, "num_single_layers": 1}),
    ),
}


def alone(name, index, text_seed, net):
    """An expert's own pipeline with a ControlNet, and with the first one's VAE, which encodes the control image."""
    components = FAMILIES[name].pipeline(index, text_seed=text_seed).components
    return NETS[name][0](**components | {"vae": FAMILIES[name].pipeline(0).vae}, controlnet=net)


def controlled(pipe, several=False):
    torch.manual_seed(0)  # SD3's pipeline draws the control image's latents by it
    image, scale = picture().resize((64, 64)), 0.7
    changes = {"control_image": [image] * 2 if several else image, "controlnet_conditioning_scale": [scale] * 2 if several else scale}
    return latents(pipe, **changes)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize(("name", "text_seeds"), [("sd3", (0, 0)), ("flux", (0, 0)), ("flux", (0, 1))])
def test_a_controlnet_steers_each_expert_as_it_steers_it_alone(name, text_seeds, several):
    """It sees the first expert's text where texts are joined; that of all where they are not."""
    kind, many, make = NETS[name]
    net = many([make(0), make(1)]) if several else make(0)
    ensemble = Ensemble.from_experts([FAMILIES[name].pipeline(index, text_seed=seed) for index, seed in enumerate(text_seeds)], aggregator="mean")
    assert ensemble.text_encoders[0].joined == (text_seeds == (0, 1))
    expected = controlled(alone(name, 0, 0, net), several)
    pipe = ensemble.pipeline(kind, controlnet=net)
    with only_expert(ensemble.denoiser, "expert_0"):
        assert torch.equal(controlled(pipe, several), expected)
        assert not torch.allclose(expected, latents(ensemble.pipeline()), atol=1e-2)
    if text_seeds == (0, 0):
        with only_expert(ensemble.denoiser, "expert_1"):
            assert torch.equal(controlled(pipe, several), controlled(alone(name, 1, 0, net), several))
    assert torch.isfinite(controlled(pipe, several)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_ip_adapter_is_refused_when_it_is_loaded(name):
    pipe = Ensemble.from_experts([FAMILIES[name].pipeline(0, text_seed=0)], aggregator="mean").pipeline()
    with pytest.raises(NotImplementedError, match="IP-Adapter is not supported on an ensemble"):
        FAMILIES[name].denoiser(pipe)._load_ip_adapter_weights([{}])
