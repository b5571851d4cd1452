"""Whole Qwen-Image 2.1 pipelines: drawn through ensembles with the text cached, guided, on white; trained from a cache and without."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import quiet
from tiny_qwen_image_21 import qwen3_encoder, qwen3_tokenizer, qwen_image_21_pipeline, transparent_vae

from afa import Ensemble, UserError
from afa.experts.text_processor import TextProcessor
from afa.explanation.attention import find_words
from afa.images import over_white
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.sampling.sample import Request, Sampling, sample
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass
from afa.training.reward_objectives import Decoder, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 3, "height": 32, "width": 64, "output_type": "pt"}
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}


def ensemble(count=3, **options):
    made = Ensemble.from_experts([qwen_image_21_pipeline(seed) for seed in range(count)], **SMALL, **options)
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


@pytest.mark.parametrize("cached", [{}, {"use_kv_cache": False}])
@pytest.mark.parametrize("guided", [{}, GUIDED])
def test_one_expert_draws_its_own_image(guided, cached):
    pipe = qwen_image_21_pipeline()
    expected = draw(pipe, CAPTIONS[:2], **guided | {"negative_prompt": ["blurry", "dark"]} if guided else {}, **cached)
    made = Ensemble.from_experts([pipe], **SMALL).pipeline()
    assert torch.equal(draw(made, CAPTIONS[:2], **guided | {"negative_prompt": ["blurry", "dark"]} if guided else {}, **cached), expected)


def test_three_experts_draw_an_image_of_their_own(three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(qwen_image_21_pipeline(seed) for seed in range(3)))]
    assert images[0].shape == (1, 4, 32, 64) and torch.isfinite(images[0]).all()
    assert all(not torch.allclose(images[0], other, atol=1e-2) for other in images[1:])


@pytest.mark.parametrize("guided", [{}, GUIDED])
def test_the_cache_of_the_text_changes_nothing(three, guided):
    pipe = three.pipeline()
    assert torch.allclose(draw(pipe, "a cat", **guided), draw(pipe, "a cat", **guided, use_kv_cache=False), atol=1e-4)


def test_an_image_does_not_depend_on_its_batch_where_prompts_are_equally_long(three):
    """Where they are not, padding moves the positions of an image, in the stock pipeline as well."""
    pipe, prompts = three.pipeline(), ["a red cat", "a dark dog"]
    together = draw(pipe, prompts)
    for index, prompt in enumerate(prompts):
        assert torch.allclose(draw(pipe, prompt, seed=3 + index), together[index : index + 1], atol=1e-3)


def test_several_images_a_prompt(three):
    images = quiet(three.pipeline())("a cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **DRAWN).images
    assert images.shape[0] == 2


def test_an_input_image_is_refused_by_name(three):
    with pytest.raises(NotImplementedError, match="editing"):
        quiet(three.pipeline())("a cat", image=Image.new("RGB", (32, 32)), output_resolution=32, num_inference_steps=2)


def test_steps_of_a_distilled_model_are_refused_by_name():
    pipe = qwen_image_21_pipeline()
    pipe.register_to_config(sample_sigmas=[1.0, 0.5])
    with pytest.raises(UserError, match=r"sample_sigmas \[1.0, 0.5\]"):
        Ensemble.from_experts([pipe], **SMALL)


def test_another_text_encoder_is_refused_by_name():
    pipes = [qwen_image_21_pipeline(0), qwen_image_21_pipeline(1, text_seed=1)]
    with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': it has text encoders of its own \(number 1\)"):
        Ensemble.from_experts(pipes, **SMALL)
    pipes[1].text_encoder = qwen3_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 48 wide, expected 24"):
        Ensemble.from_experts(pipes, **SMALL)


def test_a_text_processor_reads_text_as_a_batch_and_refuses_images():
    processor, tokenizer = TextProcessor(qwen3_tokenizer()), qwen3_tokenizer()
    message = [{"role": "system", "content": [{"type": "text", "text": "a cat"}]}]
    assert processor.apply_chat_template(message, tokenize=True, return_dict=False) == [tokenizer.encode("<|im_start|>system\na cat<|im_end|>\n")]
    read = processor(text=["a red cat", "a"], padding=True, padding_side="left", return_tensors="pt")
    assert read.input_ids.shape == (2, 3) and read.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(NotImplementedError, match="editing"):
        processor(images=[Image.new("RGB", (32, 32))], text=["a"])


# --- our sampler, sheets, words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_generation_draws_what_the_pipeline_draws_on_white(guidance):
    """As its authors recommend, without guidance if none is asked for."""
    pipe = quiet(qwen_image_21_pipeline())
    requests, sampling = [Request("a cat", 1), Request("a dog on a lawn", 2)], Sampling(2, guidance, None, 32, 32)
    expected = pipe(
        [request.prompt for request in requests],
        **{} if guidance is None else {"negative_prompt": ["", ""], "true_cfg_scale": guidance},
        num_inference_steps=2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    assert expected.shape[-1] == 4 and np.array_equal(sample(pipe, requests, sampling), (over_white(expected) * 255).round().astype(np.uint8))


def test_pictures_with_transparency_are_laid_on_white():
    picture = np.array([[[[0.2, 0.4, 0.6, 1.0], [0.2, 0.4, 0.6, 0.0], [0.0, 0.5, 1.0, 0.5]]]])
    assert np.allclose(over_white(picture), [[[[0.2, 0.4, 0.6], [1, 1, 1], [0.5, 0.75, 1.0]]]])
    assert over_white(picture[..., :3]) is not None and np.array_equal(over_white(picture[..., :3]), picture[..., :3])


def test_prompts_that_are_encoded_already_draw_the_same(three):
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(4.0), generator=generator, **DRAWN).images
    assert torch.allclose(images, draw(pipe, CAPTIONS[:2], negative_prompt=[" "] * 2, true_cfg_scale=4.0), atol=1e-5)


def test_words_are_found_behind_the_template(three):
    pipe = three.pipeline()
    states = pipe.encode_prompt(["a red cat"], device=CPU)[0]
    assert [(word.text, word.tokens) for word in find_words(pipe, "a red cat", states.shape[1])] == [("a", (3,)), ("red", (4,)), ("cat", (5,))]
    for word, other, place in (("red", "dark", 4), ("cat", "dog", 5)):
        changed = pipe.encode_prompt(["a red cat".replace(word, other)], device=CPU)[0]
        assert not torch.allclose(changed[:, place], states[:, place]) and torch.equal(changed[:, :place], states[:, :place])


def test_draft_judges_what_the_pipeline_draws(three):
    process = Noising(three.frame.scheduler, latents_of(three.frame.vae), CPU)
    latents, noise = torch.randn(2, 2, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    captions = ("a red cat", "a dark dog")
    encode = functools.partial(Conditions(quiet(three.pipeline()), three.denoiser, CPU), list(captions), torch.zeros(2, 6))
    batch = Batch(latents, noise, torch.tensor([300, 800]))
    work, seen = Pass(three.denoiser, three.denoiser, process, batch, captions, torch.tensor([False, False]), encode), []
    decoder = Decoder(three.frame.vae)
    judge = Draft(process, decoder, lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=1.0)
    losses = judge.loss(work)
    drawn = quiet(three.pipeline())(list(captions), latents=noise.flatten(2).transpose(1, 2), **DRAWN).images
    white, within = drawn[:, :3] * drawn[:, 3:] + 1 - drawn[:, 3:], (drawn[:, :3] > 0) & (drawn[:, :3] < 1)  # others are not cut
    assert within.float().mean() > 0.5 and torch.allclose((seen[0] / 2 + 0.5)[within], white[within], atol=1e-4)
    losses.sum().backward()
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in three.aggregators.values()) > 0
    three.denoiser.zero_grad()


# --- latents -----------------------------------------------------------------------------------------------------------


def test_latents_are_the_pipelines():
    """What its edits encode, an opaque image, is what training sees; what it decodes is what rewards see, on white."""
    vae, pipe = transparent_vae(), qwen_image_21_pipeline()
    latents, image = latents_of(vae), torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    opaque = pipe.image_processor.preprocess(Image.fromarray(((image[0] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()).convert("RGBA"))
    with torch.no_grad():
        moments = latents.moments(vae, opaque[:, :3])
        assert moments.shape == (1, 12, 2, 4) and latents.factor == 16 and latents.channels == 6
        assert torch.allclose(latents.scaled(moments[:, :6]), pipe._encode_vae_image(opaque[:, :, None], None)[:, :, 0], atol=1e-6)
        given = torch.randn(2, 6, 2, 4)
        stock, drawn = vae.decode(given[:, :, None]).sample[:, :, 0] / 2 + 0.5, latents.draw(vae, given) / 2 + 0.5
    within = (stock[:, :3] > 0) & (stock[:, :3] < 1)  # gradients go on where colours are cut
    assert within.any() and torch.allclose(drawn[within], (stock[:, :3] * stock[:, 3:] + 1 - stock[:, 3:])[within], atol=1e-5)


def test_a_vae_of_patches_is_refused():
    with pytest.raises(UserError, match="patch_size 2"):
        latents_of(transparent_vae(patch_size=2))


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        qwen_image_21_pipeline(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_an_expert_of_a_folder_draws_what_its_pipeline_draws(folders):
    made = Ensemble.from_experts(folders[:1], **SMALL)
    assert torch.equal(draw(made.pipeline(), "a cat"), draw(qwen_image_21_pipeline(0), "a cat"))
