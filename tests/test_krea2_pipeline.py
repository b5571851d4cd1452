"""Whole Krea 2 pipelines: drawn through ensembles, base and distilled, and trained with states of several layers, from a cache and without."""

import functools

import numpy as np
import pytest
import torch
from diffusers import Krea2Pipeline
from tiny import quiet
from tiny_krea2 import KREA2_SMALL, krea2_pipeline, krea2_transformer, qwen3_encoder

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.denoiser.hooks import record_weights
from afa.experts.description import denoiser_config
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.inspection import Subject, facts
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.prompts import lost_parts
from afa.sampling.sample import Request, Sampling, sample
from afa.stages.tokens import pack
from afa.training.cache import VaryingTextCache
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass
from afa.training.prompt_router import TextReader
from afa.training.reward_objectives import Decoder, Draft

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt", "max_sequence_length": 64}
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


def pipeline(seed=0, **changes):
    return krea2_pipeline(seed, **KREA2_SMALL | changes)


def ensemble(count=3, is_distilled=False, **options):
    made = Ensemble.from_experts([pipeline(seed, is_distilled=is_distilled) for seed in range(count)], **SMALL, **options)
    torch.manual_seed(5)
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, std=1.0)
    return made


@pytest.fixture(scope="module")
def three():
    return ensemble(placement="layers")


@pytest.fixture(scope="module")
def distilled():
    return ensemble(2, is_distilled=True)


def draw(pipe, prompt, seed=3, **changes):
    count = len(prompt) if isinstance(prompt, list) else 1
    generator = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return quiet(pipe)(prompt, generator=generator, **DRAWN | changes).images


# --- the stock pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_distilled", [False, True])
@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 0.0}, {"negative_prompt": "blurry", "guidance_scale": 2.0}])
def test_one_expert_draws_its_own_image(guided, is_distilled):
    pipe = pipeline(is_distilled=is_distilled)
    pipe.transformer.requires_grad_(False)  # torch may fold a product with trainable weights otherwise
    expected = draw(pipe, "a red bicycle", **guided)
    assert torch.equal(draw(Ensemble.from_experts([pipe], **SMALL).pipeline(), "a red bicycle", **guided), expected)


def test_a_distilled_pipeline_has_steps_of_its_own():
    assert not torch.allclose(draw(pipeline(), "a cat"), draw(pipeline(is_distilled=True), "a cat"), atol=1e-3)


def test_three_experts_draw_an_image_of_their_own(three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(pipeline(seed) for seed in range(3)))]
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


def test_weights_are_recorded_of_the_pass_with_the_prompt(three):
    pipe = three.pipeline()
    for guided in ({}, {"guidance_scale": 0.0}):
        with record_weights(three.denoiser) as maps:
            draw(pipe, "a cat", **guided)
        assert len(maps.timesteps) == len(set(maps.timesteps)) == 2
        if guided == {}:
            first = maps.maps[0]
    assert all(torch.equal(first[name], weights) for name, weights in maps.maps[0].items())  # the first step begins alike


@pytest.mark.parametrize("given", ["three", "distilled"])
def test_generation_guides_as_these_pipelines_do(given, request):
    """Without a strength it is the pipeline's own, none for distilled models; 5.5 is a guidance_scale of 4.5."""
    made = request.getfixturevalue(given)
    pipe = quiet(made.pipeline())
    requests = [Request("a cat", 1), Request("a dog on a lawn", 2)]
    for strength, scale in ((None, 4.5 if given == "three" else 0.0), (1.0, 0.0), (3.0, 2.0)):
        expected = pipe(
            [request.prompt for request in requests],
            guidance_scale=scale,
            num_inference_steps=2,
            height=32,
            width=32,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            output_type="np",
        ).images
        found = sample(pipe, requests, Sampling(2, strength, None, 32, 32))
        assert np.array_equal(found, (expected * 255).round().astype(np.uint8))
    assert made.denoiser.config["is_distilled"] == (given == "distilled") == interface_of(pipe)[1]["is_distilled"]


def test_without_a_size_the_pipeline_draws_its_own(three, monkeypatch):
    given = {}
    monkeypatch.setattr(Krea2Pipeline, "__call__", lambda self, *args, **options: given.update(options) or type("Drawn", (), {"images": np.zeros(1)}))
    sample(three.pipeline(), [Request("a cat", 1)], Sampling(2))
    assert "height" not in given and given["guidance_scale"] == 4.5


def test_prompts_that_are_encoded_already_draw_the_same(three):
    """As sheets are drawn: the caption and the prompt of nothing beside it, encoded once."""
    pipe, interface = quiet(three.pipeline()), interface_of(three.pipeline())[0]
    prompts = interface.encode_prompts(functools.partial(pipe.encode_prompt, device=CPU, max_sequence_length=64), CAPTIONS[:2])
    generator = [torch.Generator().manual_seed(3 + index) for index in range(2)]
    images = pipe(**prompts, **interface.guidance_kwargs(5.5), generator=generator, **DRAWN).images
    assert torch.equal(images, draw(pipe, CAPTIONS[:2]))


# --- what fits together ------------------------------------------------------------------------------------------------


def test_the_text_encoder_is_kept_once(three):
    assert len(three.text_encoders) == 1 and len(three.text_encoders[0].encoders) == 1 and not three.text_encoders[0].joined


def test_what_does_not_fit_is_refused_by_name():
    one = pipeline(0)
    for other, sentence in (
        (pipeline(1, is_distilled=True), "is_distilled is True, expected False"),
        (pipeline(1, text_seed=1), r"it has text encoders of its own \(number 1\)"),
        (pipeline(1, num_layers=3), "3 stages|stages K02 are not expected"),
    ):
        with pytest.raises(UserError, match=sentence):
            Ensemble.from_experts([one, other], **SMALL)
    layers = Krea2Pipeline(**pipeline(1).components, text_encoder_select_layers=(0, 1, 2))
    with pytest.raises(UserError, match=r"text_encoder_select_layers is \[0, 1, 2\], expected \[1, 2, 4\]"):
        Ensemble.from_experts([one, layers], **SMALL)
    one.text_encoder = qwen3_encoder(0, width=48)
    with pytest.raises(UserError, match="text encoder 1 is 24 wide, expected 48"):
        Ensemble.from_experts([one, pipeline(1)], **SMALL)


def test_another_patch_size_is_refused():
    made = pipeline(in_channels=64)
    pipe = Krea2Pipeline(**made.components, text_encoder_select_layers=(1, 2, 4), patch_size=4)
    with pytest.raises(UserError, match="takes 16 latent channels and its VAE has 4"):
        Ensemble.from_experts([pipe], **SMALL).pipeline()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts, as folders; distilled ones in `turbo`."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        pipeline(seed).save_pretrained(place / f"expert_{seed}")
    pipeline(0, is_distilled=True).save_pretrained(place / "turbo")
    return [str(place / f"expert_{seed}") for seed in range(2)]


def test_norms_stay_in_float32_as_diffusers_loads_them(folders):
    """And so an expert in half precision is the stock model in half precision."""
    stock = quiet(Krea2Pipeline.from_pretrained(folders[0], dtype=torch.bfloat16))
    made = Ensemble.from_experts(folders[:1], dtype=torch.bfloat16, **SMALL)
    assert {name: weight.dtype for name, weight in made.experts[0].model.named_parameters()} == {
        name: weight.dtype for name, weight in stock.transformer.named_parameters()
    }
    assert made.experts[0].model.final_layer.norm.weight.dtype == torch.float32
    assert torch.equal(draw(made.pipeline(), "a cat"), draw(stock, "a cat"))


def test_a_transformer_alone_is_called_as_the_pipeline_that_gives_it_components(folders):
    turbo = folders[0].replace("expert_0", "turbo")
    made = Ensemble.from_experts([f"e{index}={folder}/transformer" for index, folder in enumerate(folders)], frame=turbo, **SMALL)
    assert made.denoiser.config["is_distilled"] and made.pipeline().config["is_distilled"]
    assert load_expert(turbo, torch.float32, None).pipeline_options["text_encoder_select_layers"] == [1, 2, 4]
    assert denoiser_config(locate(ExpertSpec.parse(turbo)), "krea2")["is_distilled"] is True
    guided = [facts(Subject.from_sources([folder], None, Recipe("mean"), None), resolution=32)["cost"] for folder in (folders[0], turbo)]
    assert [cost["guidance_doubles"] for cost in guided] == [True, False]


def test_inspection_knows_what_is_in_the_folders(folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["vae"]["class"] == "AutoencoderKLQwenImage"
    assert [text["same_as"] for expert in found["experts"] for text in expert["text_encoders"]] == [None, "expert_0"]
    assert found["experts"][0]["text_encoders"][0]["width"] == 24 and found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 512


# --- captions ----------------------------------------------------------------------------------------------------------


def conditions(three):
    return Conditions(quiet(three.pipeline()), three.denoiser, CPU)


def told(made, captions, dropped):
    return made(captions, torch.zeros(len(captions), 6), torch.tensor(dropped))


def test_captions_keep_their_states_without_padding_and_are_dropped_one_by_one(three):
    pipe = three.pipeline()
    found = told(conditions(three), CAPTIONS, [False, True, False])
    states, mask = found["encoder_hidden_states"], found["encoder_attention_mask"]
    assert states.shape == (3, int(mask.sum(1).max()), 3, 24)
    for index, caption in enumerate((CAPTIONS[0], "", CAPTIONS[2])):
        own, kept = pipe.encode_prompt([caption], CPU)
        assert torch.allclose(states[index][mask[index]], own[0][kept[0]], atol=1e-5)


def test_without_padding_the_prediction_is_the_pipelines(three):
    """All that the pipeline hands over, padding in the middle of 512 tokens, against what training hands over."""
    pipe, interface, config = three.pipeline(), three.denoiser.interface, three.denoiser.config
    noisy, times = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        ours = interface.denoiser_kwargs(config, noisy, times, told(conditions(three), CAPTIONS[:2], [False, False]))
        states, mask = pipe.encode_prompt(CAPTIONS[:2], CPU)
        ids = pipe.prepare_position_ids(512, 2, 3, CPU)
        stock = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "position_ids": ids}
        found, expected = (three.denoiser(**ours | changes).sample for changes in ({}, stock))
    assert ours["encoder_hidden_states"].shape[1] < 20 and torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_keeps_states_of_several_layers(tmp_path, dtype):
    cache = VaryingTextCache(tmp_path, "a" * 64, (3, 4), dtype, longest=40)
    mask = torch.arange(40)[None] < torch.tensor([3, 40, 16])[:, None]
    states = torch.randn(3, 40, 3, 4).to(dtype) * mask[..., None, None]
    cache.add(["a", "b", "c"], (states, mask))
    assert sorted(cache.stores) == [16, 48] and cache.row_bytes == 48 * 12 * dtype.itemsize + 8
    for again in (cache, VaryingTextCache(tmp_path, "a" * 64, (3, 4), dtype, longest=1)):
        found, kept = again.read(["c", "a"])
        assert torch.equal(found, states[[2, 0], :16]) and torch.equal(kept, mask[[2, 0], :16])


def test_captions_of_the_cache_are_those_of_the_encoder(three, tmp_path):
    wanted = told(conditions(three), CAPTIONS, [False, False, True])
    for _ in range(2):
        made = conditions(three)
        made.keep(tmp_path, CAPTIONS, 2)
        found = told(made, CAPTIONS, [False, False, True])
        mask = found["encoder_attention_mask"]
        assert torch.equal(mask, wanted["encoder_attention_mask"])
        assert torch.allclose(found["encoder_hidden_states"][mask], wanted["encoder_hidden_states"][mask], atol=1e-5)


def test_other_layers_of_the_text_encoder_are_other_states(three, tmp_path):
    one, other = conditions(three), conditions(three)
    other.pipeline.register_to_config(text_encoder_select_layers=(0, 1, 2))
    assert one._identity() != other._identity()


def test_a_router_of_prompts_reads_all_layers(three):
    found = TextReader(three)(CAPTIONS)
    own, kept = three.pipeline().encode_prompt([CAPTIONS[1]], CPU)
    assert torch.allclose(found[1], own[0][kept[0]].mean(0).flatten(), atol=1e-5)


# --- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["three", "distilled"])
@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
def test_draft_judges_what_the_pipeline_draws(given, guidance, request):
    made = request.getfixturevalue(given)
    process = Noising(made.frame.scheduler, latents_of(made.frame.vae), CPU)
    latents, noise = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    pipe = quiet(made.pipeline())
    encode = functools.partial(Conditions(pipe, made.denoiser, CPU), CAPTIONS[1:], torch.zeros(2, 6))
    dropped = torch.tensor([False, False])
    work = Pass(made.denoiser, made.denoiser, process, Batch(latents, noise, torch.tensor([300, 800])), tuple(CAPTIONS[1:]), dropped, encode)
    seen = []
    judge = Draft(process, Decoder(made.frame.vae), lambda shown, captions: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=guidance)
    losses = judge.loss(work)
    interface, config = interface_of(pipe)
    guided = interface.pipeline_guidance(config, 2, guidance, None, None)
    drawn = pipe(CAPTIONS[1:], **guided, latents=pack(noise), **DRAWN | {"num_inference_steps": 3}).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)
    losses.sum().backward()
    assert max(float(aggregator.conv_out.weight.grad.abs().max()) for aggregator in made.aggregators.values()) > 0
    made.denoiser.zero_grad()


def test_a_bare_transformer_reads_as_an_expert():
    assert [stage.name for stage in Ensemble.from_experts([krea2_transformer()], **SMALL).denoiser.stages] == ["K00", "K01", "K02", "K03", "OUT"]


def test_a_prompt_is_cut_where_the_warning_says(three):
    """Of 512 tokens, the template takes five behind the prompt."""
    pipe = three.pipeline()
    for words, lost in ((507, {}), (508, {0: " red"})):
        prompt = " ".join(["red"] * words)
        assert lost_parts([prompt], three.denoiser.interface, [pipe.tokenizer]) == (507, lost)
    fits, cut = (pipe.encode_prompt([" ".join(["red"] * words)], CPU)[0] for words in (507, 508))
    assert torch.equal(fits, cut)
