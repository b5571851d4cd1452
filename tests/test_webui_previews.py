"""Previews of every family's pictures, packed latents included, while a stock pipeline draws them."""

import numpy as np
import pytest
import torch
from family_models import MODELS
from test_families import PIPELINES
from tiny_transformers import flux_pipeline
from torch.nn import functional

from afa.demo.data import ENSEMBLE
from afa.demo.scenes import render, sample_scenes
from afa.ensemble import Ensemble
from afa.latents import latents_of
from afa.sampling.sample import Request, Sampling, sample
from afa.stages.tokens import pack
from afa.webui.preview import colour_map, preview, previewed

TALL = Sampling(3, height=64, width=32)


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    monkeypatch.setattr("afa.webui.preview.EVERY", 0.0)


def test_every_family_is_tried():
    assert set(MODELS) == {name.partition(" ")[0] for name in PIPELINES}


@pytest.mark.parametrize("family", PIPELINES)
def test_previews_have_the_pictures_proportions_and_the_last_is_what_the_vae_decodes(family, monkeypatch):
    """A flow's last step ends at the predicted end, so the pipeline's own way from its latents to the VAE's must lead to the last preview."""
    pipeline = PIPELINES[family](0)
    pipeline.set_progress_bar_config(disable=True)
    plain = sample(pipeline, [Request("a red bicycle", 1), Request("a cat", 2)], TALL)
    decode, decoded, shown = pipeline.vae.decode, [], []
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents, *args, **kwargs: decoded.append(latents) or decode(latents, *args, **kwargs))
    with previewed(pipeline, TALL, shown.append):
        drawn = sample(pipeline, [Request("a red bicycle", 1), Request("a cat", 2)], TALL)
    assert np.array_equal(drawn, plain) and "step" not in vars(pipeline.scheduler)
    assert len(shown) >= 3 and {(one.shape, one.dtype) for one in shown} == {((64 // (unit := 64 // shown[0].shape[0]), 32 // unit, 3), np.dtype(np.uint8))}
    if type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        found = decoded[0][:1].flatten(2).unflatten(2, shown[0].shape[:2])  # without the frame that some VAEs have
        expected = preview(latents_of(pipeline.vae).scaled(found)[0], colour_map(pipeline.vae))
        assert np.abs(shown[-1].astype(int) - expected).max() <= 1 and expected.std() > 5


def test_a_preview_of_packed_latents_looks_like_the_decoded_picture():
    """The demo's VAE, which was trained, in a FLUX.1 pipeline: latents of a scene, half of them noise, stepped as the pipeline steps them."""
    pipeline, vae = flux_pipeline(0), Ensemble.load(ENSEMBLE).frame.vae
    pipeline.register_modules(vae=vae)
    pipeline.vae_scale_factor = latents_of(vae).factor
    scene = torch.from_numpy(render(sample_scenes("mixed", 1, 3)[0], np.random.default_rng(0))).permute(2, 0, 1)[None] / 127.5 - 1
    scene = functional.pad(scene, (0, 32, 0, 0))  # wider than high
    latents = latents_of(vae)
    with torch.no_grad():
        clean = latents.scaled(latents.moments(vae, scene)[:, : latents.channels])
        decoded = latents.draw(vae, latents.unscaled(clean))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    scheduler, shown = pipeline.scheduler, []
    scheduler.set_timesteps(10)
    at = scheduler.timesteps[5]
    share = float(at) / 1000
    with previewed(pipeline, Sampling(10, height=scene.shape[2], width=scene.shape[3]), shown.append):
        scheduler.step(pack(noise - clean), at, pack((1 - share) * clean + share * noise))
    small = functional.interpolate(decoded, clean.shape[-2:], mode="area")[0].permute(1, 2, 0)
    assert shown[0].shape == small.shape
    assert np.corrcoef(small.numpy().ravel(), shown[0].astype(float).ravel())[0, 1] > 0.7
