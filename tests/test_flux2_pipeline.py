"""Whole FLUX.2 pipelines, dev and klein: drawn through ensembles, guided as their kind is, trained from a cache and without."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline, Flux2Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny import quiet
from tiny_flux2 import FLUX2_SMALL, flux2_pipeline, klein_pipeline, qwen3_encoder
from torch.nn.functional import pixel_unshuffle

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.explanation.attention import find_words
from afa.inspection import Subject, facts
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.sampling.sample import Request, Sampling, sample
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass
from afa.training.reward_objectives import Decoder, Draft
from afa.training.run import train
from afa.training.settings import TrainSettings

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
DRAWN = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt", "max_sequence_length": 64}  # prompts take up to 50
CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]
KINDS = {
    "dev": functools.partial(flux2_pipeline, **FLUX2_SMALL),
    "klein base": functools.partial(klein_pipeline, **FLUX2_SMALL),
    "klein distilled": functools.partial(klein_pipeline, is_distilled=True, **FLUX2_SMALL),
}


def ensemble(kind, count=3, **options):
    made = Ensemble.from_experts([KINDS[kind](seed) for seed in range(count)], **SMALL, **options)
    torch.manual_seed(5)
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, std=1.0)
    return made


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def three(kind):
    return ensemble(kind, placement="layers")


def draw(pipe, prompt, seed=3, **changes):
    count = len(prompt) if isinstance(prompt, list) else 1
    generator = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return quiet(pipe)(prompt=prompt, generator=generator, **DRAWN | changes).images


# --- the stock pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 1.0}, {"guidance_scale": 7.0}])
def test_one_expert_draws_its_own_image_with_any_guidance(kind, guided):
    pipe = KINDS[kind]()
    made = Ensemble.from_experts([pipe], **SMALL).pipeline()
    assert type(made) is type(pipe) and made.config.get("is_distilled") == pipe.config.get("is_distilled")
    assert torch.equal(draw(made, CAPTIONS[:2], **guided), draw(pipe, CAPTIONS[:2], **guided))


def test_guidance_is_an_input_of_dev_two_passes_of_klein_and_nothing_to_a_distilled_one(kind, three):
    pipe = three.pipeline()
    passes = []
    handle = three.denoiser.register_forward_hook(lambda *_: passes.append(1))
    weak, strong = (draw(pipe, "a cat", guidance_scale=scale) for scale in (1.0, 7.0))
    handle.remove()
    assert len(passes) == {"dev": 4, "klein base": 6, "klein distilled": 4}[kind]
    assert torch.equal(weak, strong) == (kind == "klein distilled")


def test_three_experts_draw_an_image_of_their_own(kind, three):
    images = [draw(pipe, "a cat") for pipe in (three.pipeline(), *(KINDS[kind](seed) for seed in range(3)))]
    assert images[0].shape == (1, 3, 32, 48) and torch.isfinite(images[0]).all()
    assert all(not torch.allclose(images[0], other, atol=1e-2) for other in images[1:])


def test_an_image_does_not_depend_on_its_batch(three):
    pipe = three.pipeline()
    together = draw(pipe, CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        assert torch.allclose(draw(pipe, caption, seed=3 + index), together[index : index + 1], atol=1e-3)


def test_reference_images_are_refused_by_name(three):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(NotImplementedError, match="tokens of reference images"):
        draw(three.pipeline(), "a cat", image=picture)


def test_the_text_encoder_is_kept_once_and_another_is_refused_by_name(kind, three):
    assert len(three.text_encoders) == 1 and len(three.text_encoders[0].encoders) == 1
    with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': it has text encoders of its own \(number 1\)"):
        Ensemble.from_experts([KINDS[kind](0), KINDS[kind](1, text_seed=1)], **SMALL)


def test_dev_and_klein_and_distilled_and_base_do_not_mix():
    pairs = [("dev", "klein base", "guidance_embeds is False, expected True"), ("klein base", "klein distilled", "is_distilled is True, expected False")]
    for one, other, reason in pairs:
        with pytest.raises(UserError, match=reason):
            Ensemble.from_experts([KINDS[one](0), KINDS[other](1)], **SMALL)


def test_a_denoiser_alone_is_used_as_its_donor_says():
    made = Ensemble.from_experts([KINDS["klein distilled"](1).transformer, KINDS["klein distilled"](0)], **SMALL)
    pipe = made.pipeline()
    assert isinstance(pipe, Flux2KleinPipeline) and pipe.config.is_distilled and made.denoiser.config.is_distilled


def test_inpainting_of_klein_takes_the_ensemble():
    """One expert draws its own image; the pipeline pastes, and adds no tokens of a second image unless it is given one."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    mask = Image.fromarray((np.arange(1024).reshape(32, 32) % 32 < 16).astype(np.uint8) * 255)
    pipe = KINDS["klein distilled"]()
    given = {"image": picture, "mask_image": mask, "height": 32, "width": 32, "strength": 0.7}
    stock = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=True)
    with pytest.raises(NotImplementedError, match="tokens of reference images"):
        draw(Ensemble.from_experts([pipe], **SMALL).pipeline(Flux2KleinInpaintPipeline), "a cat", **given)
    assert draw(stock, "a cat", **given).shape == (1, 3, 32, 32)


def test_a_lora_of_the_stock_pipeline_reaches_the_experts(kind, three, tmp_path):
    """One expert with it draws what the stock pipeline draws with it, as an option of the spec and loaded into the pipeline."""
    pipe = KINDS[kind]()
    pipe.save_pretrained(tmp_path / "expert")
    plain = draw(pipe, "a cat")
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "add_k_proj", "to_qkv_mlp_proj", "linear_in"], init_lora_weights=False))
    type(pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    expected, file = draw(pipe, "a cat"), tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert not torch.allclose(expected, plain, atol=5e-4)
    given = Ensemble.from_experts([f"a={tmp_path / 'expert'}+{file}"], **SMALL).pipeline()
    assert torch.allclose(draw(given, "a cat"), expected, atol=1e-4)
    loaded = Ensemble.from_experts([KINDS[kind]()], **SMALL).pipeline()
    loaded.load_lora_weights(file)
    assert torch.allclose(draw(loaded, "a cat"), expected, atol=1e-4)


# --- our sampler -------------------------------------------------------------------------------------------------------

OWN = {"dev": 4.0, "klein base": 4.0, "klein distilled": None}


def test_generation_guides_as_these_pipelines_do(kind):
    pipe = quiet(KINDS[kind]())
    requests = [Request("a cat", 1), Request("a dog on a lawn", 2)]
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    for strength in (None, 1.0, *([] if kind == "klein distilled" else [3.0])):
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        scale = {"guidance_scale": strength or OWN[kind] or 1.0}
        expected = pipe(prompt=[request.prompt for request in requests], generator=generator, **scale, **options).images
        assert np.array_equal(sample(pipe, requests, Sampling(2, strength, None, 32, 32)), (expected * 255).round().astype(np.uint8))


def test_the_default_guidance_is_that_of_the_pipelines_kind(kind, three):
    interface, config = interface_of(KINDS[kind]())
    assert interface.default_guidance(config) == OWN[kind] == interface.default_guidance(three.denoiser.config)
    assert interface.default_cfg_scale(config) == (4.0 if kind == "klein base" else 1.0)
    assert interface.why_no_batched_guidance(config) != ""


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        *((name, (None, "blurry", None), "a negative prompt is not taken") for name in KINDS),
        *((name, (None, None, 3.0), "true guidance 3 is not offered") for name in KINDS),
        ("klein distilled", (4.0, None, None), "guidance 4 changes nothing .* is_distilled"),
    ],
)
def test_guidance_that_a_kind_does_not_have_is_refused(name, given, sentence):
    interface, config = interface_of(KINDS[name]())
    with pytest.raises(UserError, match=sentence):
        interface.pipeline_guidance(config, 1, *given)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("size", [(4, 6), (128, 128), (160, 256)])
def test_the_schedulers_steps_are_the_pipelines(steps, size):
    pipe = KINDS["dev"]()
    ours, interface = type(pipe.scheduler).from_config(pipe.scheduler.config), interface_of(pipe)[0]
    interface.set_timesteps(ours, steps, size)
    from diffusers.pipelines.flux2 import pipeline_flux2 as stock

    mu = stock.compute_empirical_mu(size[0] * size[1] // 4, steps)
    stock.retrieve_timesteps(pipe.scheduler, steps, CPU, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.equal(ours.sigmas, pipe.scheduler.sigmas) and torch.equal(ours.timesteps, pipe.scheduler.timesteps)


def test_draft_judges_what_the_pipeline_draws(kind, three):
    """Steps, guidance, scaling and decoding of training are those of the pipeline, to the last image."""
    process = Noising(three.frame.scheduler, latents_of(three.frame.vae), CPU)
    latents, noise = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    pipe, captions = quiet(three.pipeline()), tuple(CAPTIONS[:2])
    encode = functools.partial(Conditions(pipe, three.denoiser, CPU), list(captions), torch.zeros(2, 6))
    work = Pass(three.denoiser, three.denoiser, process, Batch(latents, noise, torch.tensor([300, 800])), captions, torch.tensor([False] * 2), encode)
    seen = []
    judge = Draft(process, Decoder(three.frame.vae), lambda shown, _: seen.append(shown) or shown.sum((1, 2, 3)), steps=3, last=1, guidance=None)
    with torch.no_grad():
        judge.loss(work)
    whole = {"num_inference_steps": 3, "max_sequence_length": 512}  # as in training
    drawn = pipe(prompt=list(captions), latents=pixel_unshuffle(noise, 2), **DRAWN | whole).images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-4)


def test_words_of_a_prompt_are_found_inside_the_chat(kind):
    """The states that aggregators attend to begin with the chat's own words; a word's tokens are those that the pipeline encodes for it."""
    pipe, prompt = KINDS[kind](), "a red cat"
    tokenizer, longer = pipe.tokenizer, KINDS[kind]().encode_prompt("a dark cat")[0]
    states = pipe.encode_prompt(prompt)[0]
    found = find_words(pipe, prompt, states.shape[1])
    assert [word.text for word in found] == ["a", "red", "cat"] and all(len(word.tokens) >= 1 for word in found)
    first = int((states - longer).abs().amax((0, 2)).gt(1e-6).nonzero()[0])  # states before the word are the same in both
    assert found[1].tokens[0] == first and tokenizer.padding_side == "right"


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng, lines = np.random.default_rng(0), []
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": CAPTIONS[index % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folders(kind, tmp_path_factory):
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        KINDS[kind](seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


@pytest.fixture
def settings(folders, images, tmp_path):
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2}
    small |= {"aggregator": "sabw", "lr": 1e-3, "device": "cpu"}
    return TrainSettings(experts=folders, data=str(images), output=str(tmp_path / "out"), steps=2, evaluate_every=2, **small)


def test_training_from_a_cache_equals_training_without(settings, tmp_path, kind):
    wanted = train(replace(settings, sheet_every=2, sheet_images=1, sheet_steps=1, caption_dropout=0.5))["history"]
    assert len(list(tmp_path.glob("out/sheets/*.png"))) == 2
    for name in {"dev": ("first",), "klein base": ("first", "second"), "klein distilled": ()}[kind]:  # a distilled one encodes as the base does
        cached = replace(settings, caption_dropout=0.5, output=str(tmp_path / name), cache=str(tmp_path / "cache"))
        found = train(cached)["history"]
        assert [entry["held_out_loss"] for entry in found] == pytest.approx([entry["held_out_loss"] for entry in wanted], rel=1e-5)
        mine, theirs = (load_file(tmp_path / folder / "aggregators.safetensors") for folder in ("out", name))
        assert all(torch.allclose(mine[tensor], theirs[tensor], atol=1e-5) for tensor in mine)
    loaded = Ensemble.load(settings.output)
    assert type(loaded.pipeline()) is (Flux2Pipeline if kind == "dev" else Flux2KleinPipeline)
    assert loaded.denoiser.config.is_distilled == (kind == "klein distilled")
    assert draw(loaded.pipeline(), "a cat").shape == (1, 3, 32, 48)


def test_inspection_knows_what_is_in_the_folders(kind, folders):
    found = facts(Subject.from_sources(folders, None, Recipe("sabw", SMALL), None), resolution=32)
    assert found["mismatches"] == [] and found["experts"][0]["vae"] | {"parameters": 0} == {
        "class": "AutoencoderKLFlux2", "parameters": 0, "dtype": "float32", "factor": 8, "latent_channels": 4, "scaling_factor": "per channel",
    }  # fmt: skip
    assert found["experts"][0]["text_encoders"][0]["width"] == 8 and found["cost"]["latent"] == [4, 4] and found["cost"]["tokens"] == 512
    assert found["cost"]["guidance_doubles"] == (kind == "klein base")


def test_the_text_encoder_of_another_width_is_refused():
    pipes = [KINDS["klein base"](0), KINDS["klein base"](1)]
    pipes[1].text_encoder = qwen3_encoder(0, hidden_size=16)
    with pytest.raises(UserError, match="text encoder 1 is 16 wide, expected 8"):
        Ensemble.from_experts(pipes, **SMALL)
