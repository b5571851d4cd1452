"""Whole Qwen-Image pipelines: drawn through ensembles, trained with prompts of varying length, from a cache and without."""

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageImg2ImgPipeline,
)
from PIL import Image
from tiny import quiet
from tiny_transformers import QWEN_IMAGE, flux_pipeline, qwen_encoder, qwen_image_pipeline

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.inspection import Subject, facts
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.sampling.sample import Request, Sampling, sample
from afa.stages.tokens import pack
from afa.training.cache import VaryingTextCache
from afa.training.conditions import Conditions, equally_long
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass
from afa.training.reward_objectives import Decoder, DirectAlign, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt"}
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


def ensemble(count=3, **options):
    made = Ensemble.from_experts([qwen_image_pipeline(seed) for seed in range(count)], **SMALL, **options)
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


@pytest.mark.parametrize("guided", [{}, {"negative_prompt": "blurry", "true_cfg_scale": 3.0}])
def test_one_expert_draws_its_own_image(guided):
    pipe = qwen_image_pipeline()
    expected = draw(pipe, "a red bicycle", **guided)
    assert torch.equal(draw(Ensemble.from_experts([pipe], **SMALL).pipeline(), "a red bicycle", **guided), expected)


def test_three_experts_draw_an_image_of_their_own(three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(qwen_image_pipeline(seed) for seed in range(3)))]
    assert images[0].shape == (1, 3, 32, 48) and torch.isfinite(images[0]).all()
    assert all(not torch.allclose(images[0], other, atol=1e-2) for other in images[1:])


def test_an_image_does_not_depend_on_its_batch(three):
    """Prompts of different lengths are padded; neither experts nor aggregators look at that."""
    pipe, guided = three.pipeline(), {"negative_prompt": "", "true_cfg_scale": 3.0}
    together = draw(pipe, CAPTIONS, **guided | {"negative_prompt": [""] * 3})
    for index, caption in enumerate(CAPTIONS):
        assert torch.allclose(draw(pipe, caption, seed=3 + index, **guided), together[index : index + 1], atol=1e-3)


def test_several_images_a_prompt(three):
    images = quiet(three.pipeline())("a cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **DRAWN).images
    assert images.shape[0] == 2


def test_img2img_takes_the_ensemble(three):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    pipe = quiet(three.pipeline(QwenImageImg2ImgPipeline))
    given = {"image": picture, "strength": 0.6, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(1)}
    images = pipe("a cat", height=32, width=48, output_type="pt", **given).images
    assert images.shape == (1, 3, 32, 48) and torch.isfinite(images).all()


def test_a_controlnet_of_the_stock_pipeline_steers_all_experts(three):
    torch.manual_seed(9)
    net = QwenImageControlNetModel(**QWEN_IMAGE | {"num_layers": 2}).eval()
    for block in (net.controlnet_x_embedder, *net.controlnet_blocks):
        torch.nn.init.normal_(block.weight, std=0.3)  # as they are made, they add nothing
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    one, pipe = Ensemble.from_experts([qwen_image_pipeline()], **SMALL), qwen_image_pipeline()
    stock = QwenImageControlNetPipeline(**pipe.components, controlnet=net)
    given = {"control_image": picture, "controlnet_conditioning_scale": 1.0}
    expected = draw(stock, "a cat", **given)
    assert torch.equal(draw(one.pipeline(QwenImageControlNetPipeline, controlnet=net), "a cat", **given), expected)
    made = three.pipeline(QwenImageControlNetPipeline, controlnet=net)
    assert not torch.allclose(draw(made, "a cat", **given), draw(made, "a cat", **given | {"controlnet_conditioning_scale": 0.0}), atol=1e-3)


def test_the_text_encoder_is_kept_once(three):
    assert len(three.text_encoders) == 1 and len(three.text_encoders[0].encoders) == 1 and not three.text_encoders[0].joined


def test_another_text_encoder_is_refused_by_name():
    pipes = [qwen_image_pipeline(0), qwen_image_pipeline(1, text_seed=1)]
    with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': it has text encoders of its own \(number 1\)"):
        Ensemble.from_experts(pipes, **SMALL)
    pipes[1].text_encoder = qwen_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 48 wide, expected 24"):
        Ensemble.from_experts(pipes, **SMALL)


def test_generation_guides_as_these_pipelines_do():
    """Their guidance_scale is for distilled models; what others mean by it is true_cfg_scale, beside a prompt of nothing."""
    pipe = quiet(qwen_image_pipeline())
    requests, sampling = [Request("a cat", 1), Request("a dog on a lawn", 2)], Sampling(2, 4.0, None, 32, 32)
    expected = pipe(
        [request.prompt for request in requests],
        negative_prompt=[" ", " "],
        true_cfg_scale=4.0,
        num_inference_steps=2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    assert np.array_equal(sample(pipe, requests, sampling), (expected * 255).round().astype(np.uint8))
    weaker = sample(pipe, requests, Sampling(2, 1.0, None, 32, 32))
    assert not np.array_equal(weaker, sample(pipe, requests, sampling))


def test_prompts_that_are_encoded_already_draw_the_same(three):
    """As sheets are drawn: the caption and the prompt of nothing beside it, encoded once."""
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(4.0), generator=generator, **DRAWN).images
    assert torch.allclose(images, draw(pipe, CAPTIONS[:2], negative_prompt=[" "] * 2, true_cfg_scale=4.0), atol=1e-5)


# --- captions of varying length ----------------------------------------------------------------------------------------


def conditions(three):
    return Conditions(quiet(three.pipeline()), three.denoiser, CPU)


def told(made, captions, dropped):
    return made(captions, torch.zeros(len(captions), 6), torch.tensor(dropped))


def test_captions_are_padded_to_the_longest_and_dropped_one_by_one(three):
    pipe = three.pipeline()
    found = told(conditions(three), CAPTIONS, [False, True, False])
    states, mask = found["encoder_hidden_states"], found["encoder_hidden_states_mask"]
    for index, caption in enumerate((CAPTIONS[0], " ", CAPTIONS[2])):
        own, padding = pipe.encode_prompt([caption], CPU)
        assert padding is None and mask[index].tolist() == [place < own.shape[1] for place in range(mask.shape[1])]
        assert torch.allclose(states[index, : own.shape[1]], own[0], atol=1e-5)


def test_a_dropped_caption_longer_than_all_others_is_kept_whole(three):
    made = conditions(three)
    made._none = made._encode([CAPTIONS[2]])
    found = told(made, ["a", "a"], [True, False])
    assert found["encoder_hidden_states_mask"].sum(1).tolist() == [made._none[1].shape[1], made._encode(["a"])[1].shape[1]]


def test_a_long_caption_is_cut_where_the_pipeline_cuts_what_it_draws(three):
    """At 512 tokens; encode_prompt by itself would keep 1024."""
    pipe, caption = three.pipeline(), " ".join(["red"] * 700)
    assert told(conditions(three), [caption], [False])["encoder_hidden_states"].shape[1] == 512 < pipe.encode_prompt([caption], CPU)[0].shape[1]


def test_equally_long_pads_the_shorter_with_zeros():
    one, other = torch.ones(2, 3, 4), torch.ones(1, 5, 4)
    longer, same = equally_long(one, other)
    assert longer.shape == (2, 5, 4) and longer[:, 3:].abs().sum() == 0 and torch.equal(longer[:, :3], one) and torch.equal(same, other)
    assert equally_long(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))[0].tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_varying_lengths_gives_back_what_it_was_given(tmp_path, dtype):
    cache = VaryingTextCache(tmp_path, "a" * 64, (4,), dtype, longest=40)
    lengths = torch.tensor([3, 40, 16])
    mask = torch.arange(40)[None] < lengths[:, None]
    states = torch.randn(3, 40, 4).to(dtype) * mask[..., None]
    assert cache.missing(["a", "b", "c", "a"]) == ["a", "b", "c"]
    cache.add(["a", "b", "c"], (states, mask))
    assert cache.missing(["c", "d"]) == ["d"] and sorted(cache.stores) == [16, 48] and cache.row_bytes == 48 * 4 * dtype.itemsize + 8
    for again in (cache, VaryingTextCache(tmp_path, "a" * 64, (4,), dtype, longest=1)):
        found, kept = again.read(["c", "a"])
        assert torch.equal(found, states[[2, 0], :16]) and torch.equal(kept, mask[[2, 0], :16])


def test_what_another_process_has_added_is_seen_after_a_refresh(tmp_path):
    one, other = (VaryingTextCache(tmp_path, "a" * 64, (4,), torch.float32, longest=4) for _ in range(2))
    one.add(["a"], (torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)))
    other.refresh()
    assert other.missing(["a"]) == [] and other.read(["a"])[0].shape == (1, 2, 4)


def test_captions_of_the_cache_are_those_of_the_encoder(three, tmp_path, capsys):
    made = conditions(three)
    wanted = told(made, CAPTIONS, [False, False, True])
    for kept in (True, False):
        made = conditions(three)
        made.keep(tmp_path, CAPTIONS, 2)
        assert ("3 captions to put into the cache" in capsys.readouterr().err) == kept
        found = told(made, CAPTIONS, [False, False, True])
        kept_states = found["encoder_hidden_states_mask"][..., None]
        assert torch.equal(found["encoder_hidden_states_mask"].sum(1), wanted["encoder_hidden_states_mask"].sum(1))
        length = min(found["encoder_hidden_states"].shape[1], wanted["encoder_hidden_states"].shape[1])
        mine, theirs = (each["encoder_hidden_states"][:, :length] * kept_states[:, :length] for each in (found, wanted))
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        qwen_image_pipeline(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_inspection_knows_what_is_in_the_folders(folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["vae"] | {"parameters": 0} == {
        "class": "AutoencoderKLQwenImage", "parameters": 0, "dtype": "float32", "factor": 8, "latent_channels": 4, "scaling_factor": "per channel",
    }  # fmt: skip
    assert [text["same_as"] for expert in found["experts"] for text in expert["text_encoders"]] == [None, "expert_0"]
    assert found["experts"][0]["text_encoders"][0]["width"] == 24 and found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 512


# --- rewards -----------------------------------------------------------------------------------------------------------


def a_pass(made, dropped=(False, False), captions=tuple(CAPTIONS[1:])):
    process = Noising(made.frame.scheduler, latents_of(made.frame.vae), CPU)
    latents, noise = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    encode = functools.partial(Conditions(quiet(made.pipeline()), made.denoiser, CPU), list(captions), torch.zeros(2, 6))
    return Pass(made.denoiser, made.denoiser, process, Batch(latents, noise, torch.tensor([300, 800])), captions, torch.tensor(dropped), encode)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draft_judges_what_the_pipeline_draws(three, guidance, dynamic):
    shift = {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02, "max_image_seq_len": 8192}  # Qwen-Image's own
    made = ensemble(2) if dynamic else three
    if dynamic:
        made.frame.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shift)
    work, seen = a_pass(made), []
    judge = Draft(work.noising, Decoder(made.frame.vae), lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=guidance)
    losses = judge.loss(work)
    pipe = quiet(made.pipeline())
    interface, config = interface_of(pipe)
    guided = interface.pipeline_guidance(config, 2, guidance, None, None)
    drawn = pipe(list(work.captions), **guided, latents=pack(work.batch.noise), **DRAWN | {"num_inference_steps": 3}).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
    losses.sum().backward()
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in made.aggregators.values()) > 0
    made.denoiser.zero_grad()


def test_a_recovered_image_is_judged(three):
    work = a_pass(three, dropped=(False, True))
    losses = DirectAlign(work.noising, Decoder(three.frame.vae), lambda shown, captions: shown.sum((1, 2, 3)), 0.5).loss(work)
    assert losses[0] != 0 and losses[1] == 0 and torch.isfinite(losses).all()


def test_flux_draws_what_its_pipeline_draws():
    made = Ensemble.from_experts([flux_pipeline(seed) for seed in range(2)], **SMALL)
    work, seen = a_pass(made), []
    Draft(work.noising, Decoder(made.frame.vae), lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=1.0).loss(work)
    drawn = quiet(made.pipeline())(list(work.captions), latents=pack(work.batch.noise), **DRAWN | {"num_inference_steps": 3}).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
