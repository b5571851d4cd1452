"""Laws of latents: what denoisers see in training is what the stock pipelines show them, whatever the VAE."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline, StableDiffusionXLPipeline
from tiny import quiet, sd_pipeline, sdxl_pipeline
from tiny import vae as plain_vae
from tiny_chroma import chroma_pipeline
from tiny_flux2 import klein_pipeline, patched_vae
from tiny_krea2 import krea2_pipeline
from tiny_lumina2 import lumina2_pipeline
from tiny_transformers import flow_scheduler, frame_vae, qwen_image_pipeline, vae
from tiny_z_image import z_image_pipeline

from afa.errors import UserError
from afa.latents import Latents, latents_of
from afa.stages.tokens import pack, unpack
from afa.training.noise import Noising
from afa.training.reward_objectives import Decoder

CPU = torch.device("cpu")
VAES = {"plain": plain_vae, "shifted": vae, "frames": frame_vae, "patches": patched_vae}  # with transparency: test_qwen_image_21_pipeline.py


@pytest.fixture(params=VAES)
def encoder(request):
    """A VAE of each kind."""
    return VAES[request.param]()


def images(count=2, height=32, width=48):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_sizes_are_as_the_config_says(encoder):
    latents = latents_of(encoder)
    with torch.no_grad():
        moments = latents.moments(encoder, images())
    assert moments.shape == (2, 2 * latents.channels, 32 // latents.factor, 48 // latents.factor) and latents.factor == 8


def test_scaling_can_be_undone(encoder):
    latents, given = latents_of(encoder), torch.randn(2, 4, 4, 6)
    assert torch.allclose(latents.unscaled(latents.scaled(given)), given, atol=1e-6)
    assert not torch.allclose(latents.scaled(given), given, atol=0.1)


def test_what_is_drawn_is_what_the_vae_decodes(encoder):
    latents, given = latents_of(encoder), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        drawn = latents.draw(encoder, given)
        stock = encoder.decode(given[:, :, None]).sample[:, :, 0] if encoder.__class__.__name__.endswith("QwenImage") else encoder.decode(given).sample
    assert torch.equal(drawn.clamp(-1, 1), stock.clamp(-1, 1))


def test_gradients_go_on_where_the_vae_of_frames_would_cut():
    encoder, given = frame_vae(), torch.randn(1, 4, 4, 4)
    torch.nn.init.constant_(encoder.decoder.conv_out.bias, 5.0)  # every pixel beyond white
    gradients = []
    for draw in (lambda x: encoder.decode(x[:, :, None]).sample, lambda x: latents_of(encoder).draw(encoder, x)):
        leaf = given.clone().requires_grad_()
        draw(leaf).sum().backward()
        gradients.append(float(leaf.grad.abs().sum()))
    assert gradients[0] == 0 and gradients[1] > 0


def test_recomputed_drawing_changes_nothing(encoder):
    found = []
    for checkpointing in (False, True):
        leaf = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
        drawn = Decoder(encoder, checkpointing)(leaf)
        drawn.square().sum().backward()
        found.append((drawn.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_recomputing_keeps_fewer_activations():
    kept = []
    for checkpointing in (False, True):
        seen: list[int] = []
        decoder = Decoder(frame_vae(), checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.numel()) or tensor, lambda tensor: tensor):  # noqa: B023
            decoder(torch.randn(1, 4, 4, 4).requires_grad_())
        kept.append(sum(seen))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("make", [qwen_image_pipeline, sd_pipeline, sdxl_pipeline, z_image_pipeline, chroma_pipeline, krea2_pipeline, lumina2_pipeline])
def test_what_a_pipeline_decodes_of_scaled_latents_is_the_image(make):
    """A pipeline stopped before its last decoding, and ours from there, give the image that the pipeline draws."""
    pipe = quiet(make())
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    draw = lambda **changes: pipe("a red bicycle", generator=torch.Generator().manual_seed(3), **options | changes).images  # noqa: E731
    latents = draw(output_type="latent")
    latents = unpack(latents, (4, 4)) if latents.ndim == 3 else latents
    with torch.no_grad():
        ours = Decoder(pipe.vae)(latents)
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), draw())


def test_what_flux2s_pipeline_decodes_of_scaled_latents_is_the_image():
    """It unscales the latents that it hands out (klein), so they are scaled again first."""
    pipe = quiet(klein_pipeline())
    options = {"num_inference_steps": 2, "height": 32, "width": 48}
    draw = lambda kind: pipe(prompt="a cat", generator=torch.Generator().manual_seed(3), output_type=kind, **options).images  # noqa: E731
    unscaled, latents = draw("latent"), latents_of(pipe.vae)
    with torch.no_grad():
        ours = Decoder(pipe.vae)(latents.scaled(unscaled))
        assert torch.equal((latents.draw(pipe.vae, unscaled) / 2 + 0.5).clamp(0, 1), draw("pt"))
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), draw("pt"), atol=1e-5)


def test_training_sees_the_latents_of_flux2s_reference_images():
    """The one place where the stock pipeline encodes an image: scaled in patches, bit for bit, in both directions and in half precision."""
    pipe, pixels = klein_pipeline(), images(count=1)
    for dtype in (torch.float32, torch.bfloat16):
        vae = pipe.vae.to(dtype)
        latents = latents_of(vae)
        with torch.no_grad():
            stock = pipe._encode_vae_image(pixels.to(dtype), torch.Generator())
            mean, _ = latents.moments(vae, pixels.to(dtype)).chunk(2, dim=1)
        scaled = latents.scaled(mean)
        assert torch.equal(pipe._pack_latents(stock), pack(scaled)) and scaled.dtype == dtype
        again = stock * torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps) + vae.bn.running_mean.view(1, -1, 1, 1)
        assert torch.equal(latents.unscaled(scaled), pipe._unpatchify_latents(again))
        assert not torch.allclose(scaled, (mean - mean.mean()) / mean.std(), atol=0.1)


def test_a_mean_and_deviation_of_channels_are_sdxls_too():
    encoder = plain_vae()
    encoder.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipe = sdxl_pipeline()
    pipe = quiet(StableDiffusionXLPipeline(**pipe.components | {"vae": encoder}))

    def draw(kind):
        noise = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=1, height=32, width=32, output_type=kind, generator=noise).images

    with torch.no_grad():
        ours = Decoder(encoder)(draw("latent"))
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), draw("pt"), atol=1e-5)


def test_training_sees_the_latents_of_img2img():
    """The stock pipeline's preparation of an image, with the same random numbers: equal, bit for bit."""
    pipe = QwenImageImg2ImgPipeline(**qwen_image_pipeline().components)
    pixels, latents = images(count=1), latents_of(pipe.vae)
    pipe.scheduler.set_timesteps(4, mu=0.5)
    with torch.no_grad():
        moments = latents.moments(pipe.vae, pixels)
        stock = pipe.prepare_latents(
            pixels, pipe.scheduler.timesteps[1:2], 1, 4, 32, 48, torch.float32, CPU, torch.Generator().manual_seed(7)
        )  # fmt: skip
        encoded = pipe._encode_vae_image(pixels[:, :, None], torch.Generator().manual_seed(7))[:, :, 0]
    process = Noising(flow_scheduler(), latents, CPU)
    data = type("Data", (), {"moments": moments, "__len__": lambda self: 1})()
    batch = process.draw(data, [0], torch.Generator().manual_seed(7))
    assert torch.equal(batch.latents, encoded)
    sigma = pipe.scheduler.sigmas[1]
    generator = torch.Generator().manual_seed(7)
    torch.randn(batch.latents.shape, generator=generator)  # what the encoding took
    noise = torch.randn(batch.latents.shape, generator=generator)
    assert torch.equal(pack(sigma * noise + (1.0 - sigma) * batch.latents), stock)


def test_qwen_images_own_vae_has_sixteen_channels_of_eight_pixels():
    with torch.device("meta"):
        real = AutoencoderKLQwenImage()
    latents = latents_of(real)
    assert (latents.channels, latents.factor) == (16, 8) and latents.scale.shape == latents.shift.shape == (16, 1, 1)
    assert torch.allclose(latents.scaled(latents.shift[None].expand(1, 16, 2, 2)), torch.zeros(()))


def test_half_precision_is_kept():
    latents = latents_of(frame_vae())
    assert latents.scaled(torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_another_vae_is_refused_by_name():
    from diffusers import AutoencoderTiny

    with pytest.raises(UserError, match="latents of a AutoencoderTiny are not known here; known VAEs are AutoencoderKL, .* choose another with vae="):
        latents_of(AutoencoderTiny())


def test_a_config_without_a_factor_scales_nothing():
    latents = Latents({"latent_channels": 4, "block_out_channels": (8, 8)})
    given = torch.randn(1, 4, 2, 2)
    assert torch.equal(latents.scaled(given), given) and latents.factor == 2
