"""Whole Lumina 2 pipelines: drawn through ensembles with both passes of guidance and its norm, trained from a cache and without."""

import functools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from peft import LoraConfig, get_peft_model_state_dict
from test_qwen_image_pipeline import a_pass, conditions, told
from tiny import quiet
from tiny_lumina2 import LUMINA2_SMALL, gemma_encoder, lumina2_pipeline

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.denoiser.hooks import record_weights
from afa.explanation.causes import find_causes
from afa.explanation.recording import record
from afa.inspection import Subject, facts
from afa.models.lumina2 import SYSTEM_PROMPT
from afa.models.registry import interface_of
from afa.prompts import lost_parts
from afa.sampling.sample import Request, Sampling, sample
from afa.training.reward_objectives import Decoder, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt"}
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


def pipeline(seed=0, **changes):
    return lumina2_pipeline(seed, **LUMINA2_SMALL | changes)


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


@pytest.mark.parametrize(
    "guided",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "blurry dark", "guidance_scale": 3.0, "cfg_normalization": False},
        {"cfg_trunc_ratio": 0.5, "system_prompt": "a lawn"},
        {"attention_kwargs": {"scale": 1.0}},
    ],
)
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


def test_a_lora_of_the_stock_pipeline_reaches_every_expert(three, tmp_path):
    """With all experts alike, the ensemble with the LoRA is the stock pipeline with it, and without it afterwards, too."""
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear_1", "norm_out.linear_2", "caption_embedder.1"], init_lora_weights=False))
    Lumina2Pipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer))
    plain, made = draw(pipeline(), "a cat"), Ensemble.from_experts([pipeline() for _ in range(2)], aggregator="mean")
    stock, drawn = pipeline(), made.pipeline()
    for each in (stock, drawn):
        each.load_lora_weights(tmp_path)
    assert torch.allclose(draw(drawn, "a cat"), draw(stock, "a cat"), atol=1e-4) and not torch.allclose(draw(stock, "a cat"), plain, atol=1e-2)
    half = {"attention_kwargs": {"scale": 0.5}}
    assert torch.allclose(draw(drawn, "a cat", **half), draw(stock, "a cat", **half), atol=1e-4)
    drawn.unload_lora_weights()
    assert torch.allclose(draw(drawn, "a cat"), plain, atol=1e-4)


def test_the_text_encoder_is_kept_once_and_another_one_is_refused_by_name(three):
    assert len(three.text_encoders) == 1 and len(three.text_encoders[0].encoders) == 1 and not three.text_encoders[0].joined
    pipes = [pipeline(0), pipeline(1, text_seed=1)]
    with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': it has text encoders of its own \(number 1\)"):
        Ensemble.from_experts(pipes, **SMALL)
    pipes[1].text_encoder = gemma_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 48 wide, expected 24"):
        Ensemble.from_experts(pipes, **SMALL)


@pytest.mark.parametrize(("strength", "negative", "scale"), [(None, "blurry", 4.0), (3.0, None, 3.0), (1.0, None, 1.0)])
def test_generation_guides_as_these_pipelines_do(strength, negative, scale):
    pipe = quiet(pipeline())
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


def test_prompts_that_are_encoded_already_draw_the_same(three):
    """As sheets are drawn: the caption, and the empty prompt without the system's, encoded once."""
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(4.0), generator=generator, **DRAWN).images
    assert torch.equal(images, draw(pipe, CAPTIONS[:2]))


# --- the two passes of guidance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_weights_are_recorded_of_the_pass_with_the_prompt(three, guidance):
    """Its pipeline makes two passes a step without saying which one runs: the first one has the prompt."""
    seen, pipe = [], three.pipeline()
    handle = three.denoiser.register_forward_pre_hook(lambda module, args, kwargs: seen.append(module.in_uncond_pass), with_kwargs=True)
    with record_weights(three.denoiser) as maps:
        draw(pipe, CAPTIONS[0], guidance_scale=guidance)
    handle.remove()
    assert seen == ([False, True] if guidance > 1 else [False]) * 2
    assert len(maps.timesteps) == 2 and maps.timesteps[0] == 1000.0 and maps.stage("OUT").shape[:3] == (2, 1, 3)
    with record_weights(three.denoiser) as alone:
        draw(pipe, CAPTIONS[0], guidance_scale=1.0)
    assert torch.equal(alone.stage("L00")[0], maps.stage("L00")[0])  # of the first step, whose latents are the same


def test_a_drawing_is_explained_by_its_pass_with_the_prompt(three):
    request, sampling = Request("a red bicycle", 1), Sampling(2, height=32, width=48)
    found = record(three, request, sampling)
    assert np.array_equal(found.image, sample(quiet(three.pipeline()), [request], sampling)[0])
    assert len(found.timesteps) == len(found.calls) == 2 and {aside for aside, _ in found.rows} == {False, True}
    before = len(three.pipeline().tokenizer(SYSTEM_PROMPT.rstrip()).input_ids)
    assert [(word.text, word.tokens) for word in found.words] == [("a", (before,)), ("red", (before + 1,)), ("bicycle", (before + 2,))]
    causes = find_causes(three.pipeline(), three.denoiser, found, count=1)
    assert np.isfinite(causes.omitted.moved).all() and causes.omitted.moved.max() > 0


# --- training ----------------------------------------------------------------------------------------------------------


def test_captions_have_the_system_prompt_and_dropped_ones_do_not_as_in_the_pipelines_guidance(three):
    pipe = three.pipeline()
    assert f"{pipe.system_prompt} <Prompt Start> " == SYSTEM_PROMPT
    found = told(conditions(three), CAPTIONS, [False, True, False])
    states, mask = found["encoder_hidden_states"], found["encoder_attention_mask"]
    before = len(pipe.tokenizer(SYSTEM_PROMPT.rstrip()).input_ids)
    assert mask.sum(1).tolist() == [before + 6, 1, before + 8] and states.shape[:2] == (3, before + 8)
    for index, caption in enumerate((CAPTIONS[0], None, CAPTIONS[2])):
        own, kept, none, none_kept = pipe.encode_prompt([caption or ""], device=CPU)
        expected = own[0][kept[0].bool()] if caption else none[0][none_kept[0].bool()]
        assert torch.allclose(states[index][mask[index]], expected, atol=1e-5)


def test_a_prompt_is_cut_where_the_warning_says(three):
    """Of 256 tokens, <bos> and the system prompt take some."""
    pipe = three.pipeline()
    room = 256 - len(pipe.tokenizer(SYSTEM_PROMPT.rstrip()).input_ids)
    for words, lost in ((room, {}), (room + 1, {0: " red"})):
        assert lost_parts([" ".join(["red"] * words)], three.denoiser.interface, [pipe.tokenizer])[1] == lost
    fits, cut = (pipe.encode_prompt([" ".join(["red"] * words)], device=CPU)[0] for words in (room, room + 1))
    assert torch.equal(fits, cut)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        pipeline(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_an_expert_in_half_precision_is_the_stock_pipeline_in_half_precision(folders):
    stock = Lumina2Pipeline.from_pretrained(folders[0], dtype=torch.bfloat16)
    made = Ensemble.from_experts(folders[:1], dtype=torch.bfloat16, **SMALL)
    assert torch.equal(draw(made.pipeline(), CAPTIONS), draw(stock, CAPTIONS))


def test_inspection_knows_what_is_in_the_folders(folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["family"] == "lumina2"
    assert [text["same_as"] for expert in found["experts"] for text in expert["text_encoders"]] == [None, "expert_0"]
    assert found["experts"][0]["text_encoders"][0]["width"] == 24 and found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 256


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draft_judges_what_the_pipeline_draws(three, guidance):
    """With the norm of its guidance, and its empty prompt."""
    work, seen = a_pass(three), []
    reward = lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3))  # noqa: E731
    judge = Draft(work.noising, Decoder(three.frame.vae), reward, steps=3, last=1, guidance=guidance)
    losses = judge.loss(work)
    drawn = quiet(three.pipeline())(list(work.captions), guidance_scale=guidance, latents=work.batch.noise, **DRAWN | {"num_inference_steps": 3}).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
    losses.sum().backward()
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in three.aggregators.values()) > 0
    three.denoiser.zero_grad()


@pytest.mark.parametrize("changes", [{"shift": 6.0}, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 40.0}])
def test_steps_are_the_pipelines_which_takes_the_channels_for_the_tokens(changes):
    ours, theirs = FlowMatchEulerDiscreteScheduler(**changes), FlowMatchEulerDiscreteScheduler(**changes)
    interface_of(pipeline())[0].set_timesteps(ours, 7, (32, 48))
    mu = calculate_shift(16, 256, 4096, changes.get("base_shift", 0.5), changes.get("max_shift", 1.15))
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=mu)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
