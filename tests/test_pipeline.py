"""An ensemble inside unmodified diffusers pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import quiet, sd_pipeline, sdxl_pipeline

from afa import Ensemble, UserError, only_expert, record_weights

CALL = {"prompt": "a red bicycle on a lawn", "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
MAKERS = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, **changes):
    return quiet(pipe)(**{**CALL, "generator": seeded(), **changes}).images


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=MAKERS)
def maker(request):
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def ensemble(maker):
    return Ensemble.from_experts([maker(seed) for seed in range(2)], **SMALL)


def test_one_expert_in_a_stock_pipeline_makes_its_own_picture(maker):
    expert = maker()
    assert np.array_equal(run(Ensemble.from_experts([expert], **SMALL).pipeline()), run(expert))


def test_copies_of_one_expert_make_its_picture(maker):
    copies = Ensemble.from_experts([maker()] * 3, **SMALL)
    assert np.abs(run(copies.pipeline()) - run(maker())).max() < 1e-4


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_several_experts_alone_is_that_expert_in_the_first_ones_frame(maker, ensemble, index):
    expert = maker(index)
    expert.vae = maker(0).vae
    with only_expert(ensemble.denoiser, f"expert_{index}"):
        assert np.array_equal(run(ensemble.pipeline()), run(expert))


def test_negative_prompt_and_several_images_per_prompt(ensemble):
    images = run(ensemble.pipeline(), prompt=["a cat", "a dog"], negative_prompt=["blurry", "dark"], num_images_per_prompt=2)
    assert images.shape == (4, 64, 64, 3)
    assert not np.array_equal(images, run(ensemble.pipeline(), prompt=["a cat", "a dog"], negative_prompt=["", ""], num_images_per_prompt=2))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_any_scheduler_and_a_callback(ensemble, scheduler):
    pipe = ensemble.pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen = []
    run(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(step) or tensors)
    assert seen == [0, 1]


def test_pipeline_to_half_precision(ensemble, maker):
    other = Ensemble.from_experts([maker(seed) for seed in range(2)], **SMALL)
    images = run(other.pipeline().to(dtype=torch.bfloat16))
    assert other.denoiser.dtype == other.text_encoders[0].dtype == torch.bfloat16
    assert np.isfinite(images).all()


def test_weights_are_recorded_for_every_step(ensemble):
    with record_weights(ensemble.denoiser) as maps:
        run(ensemble.pipeline())
    assert len(maps.maps) == 2
    assert maps.timesteps[0] > maps.timesteps[1]
    assert maps.stage("M00").shape[:3] == (2, 2, 2)  # steps, the batch doubled by guidance, experts


def test_image_to_image_from_the_pipeline(ensemble):
    pipe = AutoPipelineForImage2Image.from_pipe(ensemble.pipeline())
    assert isinstance(pipe, (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline))
    images = quiet(pipe)(prompt="a cat", image=picture(), strength=1.0, num_inference_steps=2, output_type="np", generator=seeded()).images
    assert images.shape == (1, 64, 64, 3)


def test_inpainting_with_four_channels():
    pipe = Ensemble.from_experts([sd_pipeline(seed) for seed in range(2)], **SMALL).pipeline(StableDiffusionInpaintPipeline)
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))
    images = quiet(pipe)(prompt="a cat", image=picture(), mask_image=mask, height=64, width=64, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_sees_the_first_experts_text(guess_mode):
    net = ControlNetModel.from_unet(sd_pipeline().unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    for conv in net.controlnet_down_blocks:
        torch.nn.init.normal_(conv.weight, std=0.1)
    options = {"image": picture(), "guess_mode": guess_mode}
    single = sd_pipeline()
    expected = run(StableDiffusionControlNetPipeline(**single.components, controlnet=net, requires_safety_checker=False), **options)
    ensemble = Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL)
    pipe = ensemble.pipeline(StableDiffusionControlNetPipeline, controlnet=net)
    with only_expert(ensemble.denoiser, "expert_0"):
        assert np.array_equal(run(pipe, **options), expected)
    assert not np.array_equal(run(pipe, **options), expected)


def test_a_controlnet_for_sdxl():
    net = ControlNetModel.from_unet(sdxl_pipeline().unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    ensemble = Ensemble.from_experts([sdxl_pipeline(0), sdxl_pipeline(1)], **SMALL)
    assert np.isfinite(run(ensemble.pipeline(StableDiffusionXLControlNetPipeline, controlnet=net), image=picture())).all()


def test_byte_identical_text_encoders_run_once(maker):
    shared = Ensemble.from_experts([maker(seed, text_seed=0) for seed in range(3)], **SMALL)
    assert [len(encoder.encoders) for encoder in shared.text_encoders] == [1] * len(shared.text_encoders)
    assert not any(encoder.joined for encoder in shared.text_encoders)
    single, calls = maker(0), {"ensemble": 0, "single": 0}

    def count(key):
        def hook(*args):
            calls[key] += 1

        return hook

    shared.text_encoders[0].encoders[0].register_forward_hook(count("ensemble"))
    single.text_encoder.register_forward_hook(count("single"))
    run(shared.pipeline())
    run(single)
    assert calls["ensemble"] == calls["single"] > 0


def test_some_experts_may_share_a_text_encoder(maker):
    pair = Ensemble.from_experts([maker(0, text_seed=0), maker(1, text_seed=7), maker(2, text_seed=0)], **SMALL)
    assert pair.text_encoders[0].of_expert == [0, 1, 0]
    for index, (seed, text_seed) in enumerate([(0, 0), (1, 7), (2, 0)]):
        alone = maker(seed, text_seed=text_seed)
        alone.vae = maker(0).vae
        with only_expert(pair.denoiser, pair.names[index]):
            assert np.array_equal(run(pair.pipeline()), run(alone))


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_takes_an_earlier_layer_of_every_encoder(skip):
    ensemble = Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL)
    pipe = ensemble.pipeline()
    joined = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False, clip_skip=skip)[0]
    tokens = pipe.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    for seed, part in enumerate(joined.chunk(2, dim=-1)):
        encoder = sd_pipeline(seed).text_encoder
        with torch.no_grad():
            layer = encoder(tokens, output_hidden_states=True).hidden_states[-(skip + 1)]
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            assert torch.allclose(part, norm(layer), atol=1e-6)


def test_lora_scale_reaches_every_expert():
    from peft import LoraConfig

    pipes = [sd_pipeline(seed) for seed in range(2)]
    for pipe in pipes:
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    ensemble = Ensemble.from_experts(pipes)
    off = run(ensemble.pipeline(), cross_attention_kwargs={"scale": 0.0})
    assert np.allclose(off, run(Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL).pipeline()), atol=1e-5)
    assert not np.allclose(off, run(ensemble.pipeline()), atol=1e-3)


@pytest.fixture(scope="module")
def pipe():
    return quiet(Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL).pipeline())


class TestRefusals:
    """What is not supported says so, by name."""

    def test_freeu(self, pipe):
        with pytest.raises(NotImplementedError, match="FreeU"):
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)

    def test_freeu_on_an_expert(self):
        expert = sd_pipeline()
        pipe = Ensemble.from_experts([expert, sd_pipeline(1)], **SMALL).pipeline()
        expert.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(NotImplementedError, match="FreeU"):
            run(pipe)

    def test_gligen(self, pipe):
        with pytest.raises(NotImplementedError, match="GLIGEN"):
            run(pipe, cross_attention_kwargs={"gligen": {"boxes": None}})

    def test_ip_adapter_embeds(self, pipe):
        call = {"sample": torch.zeros(1, 4, 16, 16), "timestep": 1, "encoder_hidden_states": torch.zeros(1, 7, 24)}
        with pytest.raises(NotImplementedError, match="IP-Adapter"):
            pipe.unet(**call, added_cond_kwargs={"image_embeds": torch.zeros(1, 4)})

    def test_a_lora_that_fits_nowhere(self, pipe):
        strange = {f"unet.nowhere.{part}.weight": torch.zeros(2, 2) for part in ("lora_A", "lora_B")}
        with pytest.raises(ValueError, match=r"found no place|not found"):
            pipe.unet.load_lora_adapter(strange, prefix="unet")
        assert not hasattr(pipe.unet, "peft_config")

    def test_saving_the_pipeline(self, pipe, tmp_path):
        with pytest.raises(NotImplementedError, match=r"Ensemble\.save"):
            pipe.save_pretrained(tmp_path / "pipe")
        assert not (tmp_path / "pipe").exists()

    def test_text_of_a_strange_width(self, pipe):
        with pytest.raises(ValueError, match="30 wide; expected 24 .* or 48"):
            pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 7, 30))

    def test_a_pipeline_of_bare_denoisers(self):
        with pytest.raises(UserError, match="bare denoisers"):
            Ensemble.from_experts([sd_pipeline(0).unet, sd_pipeline(1).unet], **SMALL).pipeline()

    def test_a_controlnet_of_another_architecture(self, pipe):
        call = {"sample": torch.zeros(1, 4, 16, 16), "timestep": 1, "encoder_hidden_states": torch.zeros(1, 7, 24)}
        down, middle = [torch.zeros(1, 16, 16, 16)] * 3, torch.zeros(1, 32, 2, 2)
        with pytest.raises(ValueError, match="3 ControlNet residuals for 4 skips"):
            pipe.unet(**call, down_block_additional_residuals=down, mid_block_additional_residual=middle)
