"""Stock pipelines of SD3 and FLUX.1 other than text-to-image take an ensemble; what it cannot be used for says so."""

import numpy as np
import pytest
import torch
from diffusers import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image
from tiny_transformers import flux_pipeline, sd3_pipeline

from afa import Ensemble

FILL = 16 + 16 + 4 * 64  # channels of a packed token: latents, the masked image's latents, 8×8 pixels of mask each
SHAPE = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def draw(pipe, **given):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red bicycle", generator=torch.Generator().manual_seed(0), **given).images


def framed(make, kind, count, **transformer):
    return Ensemble.from_experts([make(seed, **transformer) for seed in range(count)]).pipeline(kind)


@pytest.mark.parametrize(
    ("make", "kind", "given", "transformer"),
    [
        (sd3_pipeline, StableDiffusion3Img2ImgPipeline, {"image": image(), "strength": 0.8, **SHAPE}, {}),
        (flux_pipeline, FluxImg2ImgPipeline, {"image": image(), "strength": 0.8, **SHAPE}, {}),
        (flux_pipeline, FluxFillPipeline, {"image": image(), "mask_image": Image.new("L", (64, 64), 255), **SHAPE}, {"in_channels": FILL, "out_channels": 16}),
    ],
    ids=["sd3 img2img", "flux img2img", "flux fill"],
)
def test_one_expert_draws_what_its_own_pipeline_draws(make, kind, given, transformer):
    own = kind(**{name: part for name, part in make(0, **transformer).components.items() if name not in ("image_encoder", "feature_extractor")})
    expected = draw(own, **given)
    assert np.array_equal(draw(framed(make, kind, 1, **transformer), **given), expected)
    assert not np.array_equal(draw(framed(make, kind, 2, **transformer), **given), expected)


def test_skip_layer_guidance_skips_a_stage_of_every_expert():
    given = {**SHAPE, "num_inference_steps": 4, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}
    expected = draw(sd3_pipeline(0), **given)
    assert np.array_equal(draw(framed(sd3_pipeline, None, 1), **given), expected)
    assert not np.array_equal(draw(sd3_pipeline(0), **{name: given[name] for name in given if "skip" not in name}), expected)


def test_kontext_is_refused_where_it_has_an_image_to_look_at():
    with pytest.raises(NotImplementedError, match="reference images"):
        draw(framed(flux_pipeline, FluxKontextPipeline, 2), image=image(), max_area=64**2, _auto_resize=False, **SHAPE)
