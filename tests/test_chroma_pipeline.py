"""Whole Chroma pipelines: drawn through ensembles with both passes of guidance, trained from a cache and without."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ChromaImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import quiet
from tiny_chroma import CHROMA_SMALL, chroma_pipeline
from tiny_transformers import t5_encoder

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.cli.main import main
from afa.denoiser.hooks import record_weights
from afa.denoiser.reuse import Reuse
from afa.explanation.causes import find_causes
from afa.explanation.recording import record
from afa.inspection import Subject, facts
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Request, Sampling, sample
from afa.stages.tokens import pack
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass
from afa.training.reward_objectives import Decoder, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt", "max_sequence_length": 64}
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


def pipeline(seed=0, **changes):
    return chroma_pipeline(seed, **CHROMA_SMALL | changes)


def ensemble(count=3, **options):
    made = Ensemble.from_experts([pipeline(seed) for seed in range(count)], **SMALL, **options)
    torch.manual_seed(5)
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, std=1.0)
    return made


@pytest.fixture(scope="module")
def three():
    return ensemble(placement="layers")


def draw(pipe, prompt, seed=3, **changes):
    count = len(prompt) if isinstance(prompt, list) else 1
    generator = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return quiet(pipe)(prompt, generator=generator, **DRAWN | changes).images


# --- the stock pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "blurry dark", "guidance_scale": 3.0}])
def test_one_expert_draws_its_own_image(guided):
    pipe = pipeline()
    expected = draw(pipe, "a red bicycle", **guided)
    assert torch.equal(draw(Ensemble.from_experts([pipe], **SMALL).pipeline(), "a red bicycle", **guided), expected)


def test_three_experts_draw_an_image_of_their_own(three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(pipeline(seed) for seed in range(3)))]
    assert images[0].shape == (1, 3, 32, 48) and torch.isfinite(images[0]).all()
    assert all(not torch.allclose(images[0], other, atol=1e-2) for other in images[1:])


def test_an_image_does_not_depend_on_its_batch(three):
    pipe = three.pipeline()
    together = draw(pipe, CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        assert torch.allclose(draw(pipe, caption, seed=3 + index), together[index : index + 1], atol=1e-3)
    assert not torch.allclose(draw(pipe, CAPTIONS[0], seed=4), together[1:2], atol=1e-3)


def test_several_images_a_prompt(three):
    images = quiet(three.pipeline())("a cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **DRAWN).images
    assert images.shape[0] == 2


def test_img2img_takes_the_ensemble():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    given = {"image": picture, "strength": 0.6, "num_inference_steps": 4, "height": 32, "width": 48}
    pipe = pipeline()
    one = Ensemble.from_experts([pipe], **SMALL).pipeline(ChromaImg2ImgPipeline)
    images = [draw(each, "a cat", **given) for each in (ChromaImg2ImgPipeline(**pipe.components), one)]
    assert torch.equal(*images) and images[0].shape == (1, 3, 32, 48)


def test_experts_may_have_text_encoders_of_their_own():
    pipes = [pipeline(0), pipeline(1, text_seed=1)]
    made = Ensemble.from_experts(pipes, **SMALL, placement="out", vae="expert_1")
    images = make_sampler("noise_average", made, weights=[0, 1])([Request("a cat", 1)], Sampling(2, height=32, width=48))
    assert np.array_equal(images, sample(quiet(pipes[1]), [Request("a cat", 1)], Sampling(2, height=32, width=48)))
    pipes[1].text_encoder = t5_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 48 wide, expected 24"):
        Ensemble.from_experts(pipes, **SMALL)


def test_generation_guides_as_these_pipelines_do():
    pipe = quiet(pipeline())
    requests, sampling = [Request("a cat", 1), Request("a dog on a lawn", 2)], Sampling(2, None, "blurry", 32, 32)
    expected = pipe(
        [request.prompt for request in requests],
        negative_prompt=["blurry"] * 2,
        guidance_scale=5.0,
        num_inference_steps=2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    assert np.array_equal(sample(pipe, requests, sampling), (expected * 255).round().astype(np.uint8))
    weaker = sample(pipe, requests, replace(sampling, guidance=1.0, negative_prompt=None))
    assert not np.array_equal(weaker, sample(pipe, requests, sampling))


def test_prompts_that_are_encoded_already_draw_the_same(three):
    """As sheets are drawn: the caption and the empty prompt beside it, encoded once."""
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU, max_sequence_length=64), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(4.0), generator=generator, **DRAWN).images
    assert torch.equal(images, draw(pipe, CAPTIONS[:2], guidance_scale=4.0))


# --- the two passes of guidance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_weights_are_recorded_of_the_pass_with_the_prompt(three, guidance):
    """Its pipelines make two passes a step without saying which one runs: the first one has the prompt."""
    seen, pipe = [], three.pipeline()
    handle = three.denoiser.register_forward_pre_hook(lambda module, args, kwargs: seen.append(module.in_uncond_pass), with_kwargs=True)
    with record_weights(three.denoiser) as maps:
        for caption in CAPTIONS[:2]:
            draw(pipe, caption, guidance_scale=guidance)
    handle.remove()
    assert seen == ([False, True] if guidance > 1 else [False]) * 4
    assert len(maps.timesteps) == 4 and maps.stage("OUT").shape[:3] == (4, 1, 3)
    with record_weights(three.denoiser) as alone:
        draw(pipe, CAPTIONS[0], guidance_scale=1.0)
    assert torch.equal(alone.stage("D00")[0], maps.stage("D00")[0])  # of the first step, whose latents are the same


def test_both_passes_are_reused_apart(three):
    """What the ensemble predicts beyond one expert differs between the two passes, and each keeps its own."""
    pipe, options = three.pipeline(), {"num_inference_steps": 4, "negative_prompt": "blurry dark"}
    whole = draw(pipe, "a cat", **options)
    three.denoiser.reuse = Reuse(2, lead="expert_0")
    try:
        reused = draw(pipe, "a cat", **options)
        assert len(three.denoiser._steps) == 2 and all(steps.beyond is not None for steps in three.denoiser._steps.values())
    finally:
        three.denoiser.reuse = None
    apart = [float((image - whole).square().mean()) for image in (reused, draw(pipe, "a red lawn"))]
    assert 0 < apart[0] < apart[1]


def test_the_base_is_mixed_into_the_pass_without_the_prompt(three):
    found, sampler = [], make_sampler("loratorio", ensemble(2), base=pipeline(2))
    original = sampler.denoiser.combine
    sampler.denoiser.combine = lambda *given: found.append((sampler.denoiser.ensemble.in_uncond_pass, *original(*given))) or found[-1][1:]
    with record_weights(sampler.denoiser) as maps:
        sampler([Request("a cat", 1)], Sampling(2, height=32, width=48))
    assert [uncond for uncond, *_ in found] == [False, True] * 2 and len(maps.timesteps) == 2
    assert torch.equal(found[0][2], found[1][2]) and not torch.equal(found[0][2], found[2][2])


def test_a_drawing_is_explained_by_its_pass_with_the_prompt(three):
    request, sampling = Request("a red bicycle", 1), Sampling(2, height=32, width=48)
    found = record(three, request, sampling)
    assert np.array_equal(found.image, sample(quiet(three.pipeline()), [request], sampling)[0])
    assert len(found.timesteps) == len(found.calls) == 2 and {aside for aside, _ in found.rows} == {False, True}
    assert [word.text for word in found.words] == ["a", "red", "bicycle"] and found.words[1].tokens == (1,)
    causes = find_causes(three.pipeline(), three.denoiser, found, count=1)
    assert np.isfinite(causes.omitted.moved).all() and causes.omitted.moved.max() > 0


# --- training ----------------------------------------------------------------------------------------------------------


def test_captions_and_their_masks_are_the_pipelines_and_dropped_one_by_one(three):
    pipe = three.pipeline()
    found = Conditions(quiet(pipe), three.denoiser, CPU)(CAPTIONS, torch.zeros(3, 6), torch.tensor([False, True, False]))
    states, mask = found["encoder_hidden_states"], found["attention_mask"]
    for index, caption in enumerate((CAPTIONS[0], "", CAPTIONS[2])):
        own, _, own_mask, *_ = pipe.encode_prompt([caption], device=CPU)
        assert torch.equal(mask[index], own_mask[0]) and torch.allclose(states[index], own[0], atol=1e-5)
    assert mask.sum(1).tolist() == [8, 2, 10]  # words, their end, and one token of padding


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        pipeline(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_inspection_knows_what_is_in_the_folders(folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["family"] == "chroma"
    assert [text["class"] for expert in found["experts"] for text in expert["text_encoders"]] == ["T5EncoderModel"] * 2
    assert found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 512


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_draft_judges_what_the_pipeline_draws(three, guidance):
    process = Noising(three.frame.scheduler, latents_of(three.frame.vae), CPU)
    latents, noise = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    captions, seen = tuple(CAPTIONS[1:]), []
    encode = functools.partial(Conditions(quiet(three.pipeline()), three.denoiser, CPU), list(captions), torch.zeros(2, 6))
    work = Pass(three.denoiser, three.denoiser, process, Batch(latents, noise, torch.tensor([300, 800])), captions, torch.tensor([False] * 2), encode)
    judge = Draft(process, Decoder(three.frame.vae), lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=guidance)
    judge.loss(work).sum().backward()
    given = DRAWN | {"num_inference_steps": 3, "max_sequence_length": 512}  # as in training
    drawn = quiet(three.pipeline())(list(captions), guidance_scale=guidance, latents=pack(noise), **given).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in three.aggregators.values()) > 0
    three.denoiser.zero_grad()


# --- LoRAs -------------------------------------------------------------------------------------------------------------


def test_a_lora_in_the_publishers_names_is_that_in_diffusers_names(tmp_path, folders):
    """Extracted for other programs and for diffusers, and given to an expert: the same image, which is not the base's."""
    images = []
    for output in ("", "diffusers", "lora.safetensors"):
        lora = tmp_path / output
        if output:
            assert main(["extract", folders[1], "--base", folders[0], "--rank", "2", "--output", str(lora), "--device", "cpu"]) == 0
        file = lora / "pytorch_lora_weights.safetensors" if output == "diffusers" else lora
        made = Ensemble.from_experts([f"{folders[0]}+{file}" if output else folders[0]])
        images.append(draw(made.pipeline(), "a cat"))
    assert torch.allclose(images[1], images[2], atol=1e-4) and not torch.allclose(images[0], images[1], atol=1e-2)
    names = load_file(tmp_path / "lora.safetensors")
    assert {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_single_blocks_2_linear1.lora_down.weight"} <= set(names)


def test_a_lora_that_is_loaded_into_the_pipeline_reaches_the_expert(tmp_path, folders):
    assert main(["extract", folders[1], "--base", folders[0], "--rank", "2", "--output", str(tmp_path / "lora"), "--device", "cpu"]) == 0
    stock, made = pipeline(0), Ensemble.from_experts([pipeline(0)], **SMALL).pipeline()
    before = draw(made, "a cat")
    for pipe in (stock, made):
        pipe.load_lora_weights(str(tmp_path / "lora"))
    assert torch.allclose(draw(made, "a cat"), draw(stock, "a cat"), atol=1e-5) and not torch.allclose(draw(made, "a cat"), before, atol=1e-2)


@pytest.mark.parametrize("method", ["magicfusion", "superdiff_or"])
def test_methods_that_need_both_predictions_in_one_pass_are_refused_by_name(three, method):
    with pytest.raises(UserError, match="one after another"):
        make_sampler(method, three)
