"""Whole Z-Image pipelines: drawn through ensembles with and without guidance, trained with captions of varying length, recorded, distilled."""

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from test_qwen_image_pipeline import a_pass, conditions, told
from tiny import quiet
from tiny_z_image import qwen3_encoder, z_image_pipeline

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.denoiser.hooks import record_weights
from afa.explanation.recording import record
from afa.inspection import Subject, facts
from afa.models.registry import interface_of
from afa.pictures import conditional
from afa.sampling.guidance_interval import guided_within
from afa.sampling.loratorio import loratorio
from afa.sampling.magicfusion import magicfusion
from afa.sampling.options import Loratorio, MagicFusion
from afa.sampling.sample import Request, Sampling, sample
from afa.training.reward_objectives import Decoder, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt", "max_sequence_length": 128}
CAPTIONS = ["a red bicycle on a lawn", "a cat", " ".join(["a dark dog on a blurry red lawn"] * 5)]
GUIDED = {"guidance_scale": 3.0}


def ensemble(count=3, **options):
    made = Ensemble.from_experts([z_image_pipeline(seed) for seed in range(count)], **SMALL, **options)
    torch.manual_seed(5)
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, std=1.0)
    return made


@pytest.fixture(scope="module")
def three():
    return ensemble(placement="layers")


def draw(pipe, prompt, seed=3, **changes):
    count = len(prompt) if isinstance(prompt, list) else 1
    prompt = list(prompt) if isinstance(prompt, list) else prompt  # the pipeline writes its template into the list
    generator = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return quiet(pipe)(prompt, generator=generator, **DRAWN | GUIDED | changes).images


# --- the stock pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guided",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "negative_prompt": "blurry dark", "cfg_normalization": True},
        {"guidance_scale": 3.0, "cfg_truncation": 0.1},
    ],
)
def test_one_expert_draws_its_own_image(guided):
    pipe = z_image_pipeline()
    expected = draw(pipe, "a red bicycle", **guided)
    assert torch.equal(draw(Ensemble.from_experts([pipe], **SMALL).pipeline(), "a red bicycle", **guided), expected)


def test_three_experts_draw_an_image_of_their_own(three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(z_image_pipeline(seed) for seed in range(3)))]
    assert images[0].shape == (1, 3, 32, 48) and torch.isfinite(images[0]).all()
    assert all(not torch.allclose(images[0], other, atol=1e-2) for other in images[1:])


def test_an_image_does_not_depend_on_its_batch(three):
    pipe = three.pipeline()
    together = draw(pipe, CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        assert torch.allclose(draw(pipe, caption, seed=3 + index), together[index : index + 1], atol=1e-3)


def test_several_images_a_prompt(three):
    images = quiet(three.pipeline())("a cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **DRAWN).images
    assert images.shape[0] == 2


def test_img2img_takes_the_ensemble(three):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    one, pipe = Ensemble.from_experts([z_image_pipeline()], **SMALL), z_image_pipeline()
    given = {"image": picture, "strength": 0.6, "num_inference_steps": 4}
    expected = draw(ZImageImg2ImgPipeline(**pipe.components), "a cat", **given)
    assert torch.equal(draw(one.pipeline(ZImageImg2ImgPipeline), "a cat", **given), expected)
    assert not torch.allclose(draw(three.pipeline(ZImageImg2ImgPipeline), "a cat", **given), expected, atol=1e-2)


@pytest.mark.parametrize("noise_refiner", [None, "control_layers", "control_noise_refiner"])
def test_a_controlnet_of_the_stock_pipeline_steers_all_experts(three, noise_refiner):
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    places = {"control_layers_places": [0, 2], "control_refiner_layers_places": [0, 1], "add_control_noise_refiner": noise_refiner}

    def net():
        torch.manual_seed(9)
        made = ZImageControlNetModel(**places, control_in_dim=4, dim=32, n_refiner_layers=2, n_heads=2, n_kv_heads=2)
        for parameter in made.parameters():  # as they are made, they add nothing
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return made.eval()

    one, pipe = Ensemble.from_experts([z_image_pipeline()], **SMALL), z_image_pipeline()
    given = {"control_image": picture, "controlnet_conditioning_scale": 1.0}
    expected = draw(ZImageControlNetPipeline(**pipe.components, controlnet=net()), "a cat", **given)
    assert torch.equal(draw(one.pipeline(ZImageControlNetPipeline, controlnet=net()), "a cat", **given), expected)
    made = three.pipeline(ZImageControlNetPipeline, controlnet=net())
    assert not torch.allclose(draw(made, "a cat", **given), draw(made, "a cat", **given | {"controlnet_conditioning_scale": 0.0}), atol=1e-3)


def test_a_lora_of_the_stock_pipeline_reaches_every_expert(three, tmp_path):
    """With all experts alike, the ensemble with the LoRA is the stock pipeline with it, and without it afterwards, too."""
    pipe = z_image_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "w1", "linear", "cap_embedder.1"], init_lora_weights=False))
    ZImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer))
    plain, made = draw(z_image_pipeline(), "a cat"), Ensemble.from_experts([z_image_pipeline() for _ in range(2)], aggregator="mean")
    stock, drawn = z_image_pipeline(), made.pipeline()
    for each in (stock, drawn):
        each.load_lora_weights(tmp_path)
    assert torch.allclose(draw(drawn, "a cat"), draw(stock, "a cat"), atol=1e-4) and not torch.allclose(draw(stock, "a cat"), plain, atol=1e-2)
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    assert torch.allclose(draw(drawn, "a cat", **half), draw(stock, "a cat", **half), atol=1e-4)
    drawn.unload_lora_weights()
    assert torch.allclose(draw(drawn, "a cat"), plain, atol=1e-4)


def test_the_text_encoder_is_kept_once(three):
    assert len(three.text_encoders) == 1 and len(three.text_encoders[0].encoders) == 1 and not three.text_encoders[0].joined


def test_another_text_encoder_is_refused_by_name():
    pipes = [z_image_pipeline(0), z_image_pipeline(1, text_seed=1)]
    with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': it has text encoders of its own \(number 1\)"):
        Ensemble.from_experts(pipes, **SMALL)
    pipes[1].text_encoder = qwen3_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 48 wide, expected 24"):
        Ensemble.from_experts(pipes, **SMALL)


@pytest.mark.parametrize(("strength", "negative", "scale"), [(4.0, None, 3.0), (4.0, "blurry", 3.0), (1.0, None, 0.0), (None, None, 5.0)])
def test_guidance_of_one_is_none_and_the_pipelines_zero(strength, negative, scale):
    """Strength means the same in all families; these pipelines count it from 0."""
    pipe = quiet(z_image_pipeline())
    requests, sampling = [Request("a cat", 1), Request("a dog on a lawn", 2)], Sampling(2, strength, negative, 32, 32)
    expected = pipe(
        [request.prompt for request in requests],
        negative_prompt=None if negative is None else [negative] * 2,
        guidance_scale=scale,
        num_inference_steps=2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    assert np.array_equal(sample(pipe, requests, sampling), (expected * 255).round().astype(np.uint8))


def test_guidance_in_training_is_the_pipelines():
    uncond, cond = torch.randn(2, 2, 4, 4, 6)
    assert torch.allclose(interface_of(z_image_pipeline())[0].apply_guidance(uncond, cond, 4.0), cond + 3.0 * (cond - uncond), atol=1e-5)


def test_prompts_that_are_encoded_already_draw_the_same(three):
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(4.0), generator=generator, **DRAWN).images
    assert torch.allclose(images, draw(pipe, ["a red bicycle on a lawn", "a cat"]), atol=1e-5)


# --- the half of the batch with the prompt comes first -----------------------------------------------------------------


def test_recorded_weights_are_those_of_the_prompt(three):
    """With a negative prompt that changes, the maps of the pass with the prompt stay."""
    found = []
    for negative in ("", "blurry dark lawn"):
        with record_weights(three.denoiser) as maps:
            draw(three.pipeline(), "a cat", negative_prompt=negative, num_inference_steps=1)
        found.append([maps.maps[0]["Z00"], conditional(maps, 1)[0]["Z00"]])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6) and not torch.allclose(found[0][0], found[1][0], atol=1e-4)


def test_a_recording_is_of_the_prompt_and_its_images_are_the_pipelines(three):
    pipe, shape = quiet(three.pipeline()), {"steps": 2, "guidance": 4.0, "height": 32, "width": 32}
    recordings = [record(three, Request("a red cat", 1), Sampling(negative_prompt=negative, **shape), pipe) for negative in (None, "blurry dark")]
    one, other = recordings
    assert one.timesteps == other.timesteps and one.timesteps[0] == 1000.0
    assert torch.allclose(one.maps["Z00"][0], other.maps["Z00"][0], atol=1e-3)
    assert [word.text for word in one.words] == ["a", "red", "cat"] and one.attention is not None
    assert len(one.calls[0]["x"]) == len(one.calls[0]["cap_feats"]) == 1 and one.calls[0]["cap_feats"][0].shape == other.calls[0]["cap_feats"][0].shape
    assert torch.equal(one.calls[0]["cap_feats"][0], other.calls[0]["cap_feats"][0])
    assert np.abs(one.drawn[1].astype(int) - one.image.astype(int)).max() <= 2  # what it claims at the last step is the image


def test_shared_guidance_weighs_both_predictions_as_with_the_prompt(three):
    three.denoiser.share_guidance_weights = True
    with record_weights(three.denoiser) as maps:
        draw(three.pipeline(), ["a cat", "a dog"], num_inference_steps=1)
    three.denoiser.share_guidance_weights = False
    with record_weights(three.denoiser) as own:
        draw(three.pipeline(), ["a cat", "a dog"], num_inference_steps=1)
    first = three.denoiser.fused[0]
    assert torch.equal(maps.maps[0][first][:2], maps.maps[0][first][2:])
    assert torch.allclose(maps.maps[0][first][:2], own.maps[0][first][:2], atol=1e-6)
    assert not torch.allclose(own.maps[0][first][:2], own.maps[0][first][2:], atol=1e-5)


def test_guidance_in_an_interval_of_the_steps(three):
    pipe = quiet(three.pipeline())
    with guided_within(pipe, (0.0, 1.0)):
        assert torch.equal(draw(pipe, ["a cat", "a dog"]), draw(three.pipeline(), ["a cat", "a dog"]))
    with guided_within(pipe, (0.9, 1.0)):
        without = draw(pipe, ["a cat", "a dog"])
    assert torch.allclose(without, draw(three.pipeline(), ["a cat", "a dog"], guidance_scale=0.0), atol=1e-4)


def test_loratorio_weighs_by_the_prompt(three):
    """And so with any negative prompt the same."""
    found, shape = [], {"steps": 1, "guidance": 4.0, "height": 32, "width": 32}
    for negative in (None, "blurry dark"):
        sampler = loratorio(three, Loratorio(temperature=0.1), z_image_pipeline(9))
        with record_weights(sampler.denoiser) as maps:
            sampler([Request("a cat", 1)], Sampling(negative_prompt=negative, **shape))
        found.append(maps.maps[0]["OUT"])
    assert torch.allclose(*found, atol=1e-3) and not torch.allclose(found[0], torch.full((), 1 / 3), atol=1e-2)


@pytest.mark.parametrize("make", [lambda made: loratorio(made, Loratorio(), z_image_pipeline(9)), lambda made: magicfusion(made, MagicFusion())])
def test_methods_of_guidance_do_not_take_one_half_for_the_other(make):
    """Of equal experts (and an equal base) any combination is that expert."""
    alike = Ensemble.from_experts([z_image_pipeline(9) for _ in range(2)], **SMALL)
    requests, sampling = [Request("a cat", 1), Request("a dog on a lawn", 2)], Sampling(2, 4.0, None, 32, 32)
    expected = sample(quiet(z_image_pipeline(9)), requests, sampling).astype(int)
    assert np.abs(make(alike)(requests, sampling).astype(int) - expected).max() <= 1


# --- captions of varying length ----------------------------------------------------------------------------------------


def test_captions_are_dropped_one_by_one_and_their_list_is_left_alone(three):
    pipe, captions = three.pipeline(), list(CAPTIONS)
    found = told(conditions(three), captions, [False, True, False])["cap_feats"]
    assert captions == CAPTIONS
    for mine, caption in zip(found, (CAPTIONS[0], "", CAPTIONS[2]), strict=True):
        (own,), _ = pipe.encode_prompt([caption], CPU)
        assert mine.shape == own.shape and torch.allclose(mine, own, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        z_image_pipeline(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_inspection_knows_what_is_in_the_folders(folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["family"] == "z-image"
    assert [text["same_as"] for expert in found["experts"] for text in expert["text_encoders"]] == [None, "expert_0"]
    assert found["experts"][0]["text_encoders"][0]["width"] == 24 and found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 512


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draft_judges_what_the_pipeline_draws(three, guidance, dynamic):
    made = ensemble(2) if dynamic else three
    if dynamic:
        made.frame.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    work, seen = a_pass(made), []
    judge = Draft(work.noising, Decoder(made.frame.vae), lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=guidance)
    losses = judge.loss(work)
    pipe = quiet(made.pipeline())
    interface, config = interface_of(pipe)
    guided = interface.pipeline_guidance(config, 2, guidance, None, None)
    drawn = pipe(list(work.captions), **guided, latents=work.batch.noise, **DRAWN | {"num_inference_steps": 3}).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
    losses.sum().backward()
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in made.aggregators.values()) > 0
    made.denoiser.zero_grad()
