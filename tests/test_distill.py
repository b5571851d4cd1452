"""Distillation: a student is trained on its own samplings towards an ensemble's answers, and becomes an ordinary model."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from merging_models import flux, saved, sd, sd3, sdxl
from processes import in_processes
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import experts, images, interrupt_after  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, SDXL_SMALL, quiet, scheduler
from tiny_chroma import chroma_pipeline
from tiny_flux2 import klein_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_qwen_image_21 import qwen_image_21_pipeline
from tiny_transformers import FLUX_SMALL, QWEN_IMAGE_SMALL, SD3_SMALL, flow_scheduler, qwen_image_pipeline
from tiny_z_image import z_image_pipeline

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.distillation.plan import RECORD, plan_distill
from afa.distillation.run import distill, distill_finished
from afa.distillation.settings import DistillSettings
from afa.distillation.student import KEY
from afa.experts.load import load_expert
from afa.experts.lora import fuse
from afa.experts.lora_files import A, B, kohya_tensors, save_kohya
from afa.latents import Latents, latents_of
from afa.models.registry import FAMILIES
from afa.models.unet import UNetEnsemble
from afa.sampling.registry import teaching_methods
from afa.sampling.sample import Request, Sampling, sample
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.finetune import add_lora, lora_tensors
from afa.training.noise import Noising
from afa.training.prepare import recombined
from afa.training.state import state_file
from afa.training.teacher import Teacher, own_samplings, teaching_method
from afa.training.trajectories import GROUPS, Trajectories, spaced

LATENTS = Latents({"latent_channels": 4, "block_out_channels": (1, 1)})
SHAPE = (4, 4, 4)
ONE = ONE_LEVEL | {"sample_size": 8}
PIPELINES = {
    "sd": lambda seed: sd(seed, sample_size=8),
    "sdxl": lambda seed: sdxl(seed, **SDXL_SMALL),
    "sd3": lambda seed: sd3(seed, **SD3_SMALL),
    "flux": lambda seed: flux(seed, **FLUX_SMALL),
    "qwen-image": lambda seed: qwen_image_pipeline(seed, **QWEN_IMAGE_SMALL),
    "krea2": lambda seed: krea2_pipeline(seed, **KREA2_SMALL),
    "lumina2": lambda seed: lumina2_pipeline(seed, **LUMINA2_SMALL),
}


MAKE = PIPELINES | {"one": lambda seed: sd(seed, **ONE)}  # for laws of the run: a step takes as long as there are stages


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_text("\n".join(f"a picture of {number}" for number in range(12)) + "\n")
    return file


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """family -> the folder of an ensemble of two experts, made when it is first asked for."""
    home, made = tmp_path_factory.mktemp("teachers"), {}

    def teacher(family):
        if family not in made:
            torch.manual_seed(0)
            places = [str(saved(MAKE[family](seed), home / f"{family}-{seed}")) for seed in (1, 2)]
            ensemble = Ensemble.from_experts(places, aggregator="mean")
            ensemble.save(home / family)
            made[family] = home / family
        return made[family]

    return teacher


@pytest.fixture
def settings(teachers, captions, tmp_path):
    small = {"batch_size": 4, "held_out": 2, "steps": 6, "evaluate_every": 2, "lr": 1e-3, "device": "cpu", "resolution": 16}
    return DistillSettings(ensemble=str(teachers("one")), data=str(captions), output=str(tmp_path / "out"), trajectory_steps=3, warm_up=0, **small)


@pytest.fixture(scope="module")
def two_steps(teachers, captions, tmp_path_factory):
    """family -> the settings and the record of a complete run, made when it is first asked for; only to be read."""
    home, made = tmp_path_factory.mktemp("two-steps"), {}

    def run(family):
        if family not in made:
            small = {"batch_size": 4, "held_out": 2, "steps": 2, "evaluate_every": 1, "lr": 1e-3, "device": "cpu", "resolution": 32}
            places = {"ensemble": str(teachers(family)), "data": str(captions), "output": str(home / family)}
            settings = DistillSettings(**places, trajectory_steps=3, warm_up=0, **small)
            made[family] = settings, distill(settings)
        return made[family]

    return run


def drawn(place, guidance=3.0, **how):
    """A picture by a stock pipeline."""
    pipe = quiet(how.pop("kind", StableDiffusionPipeline).from_pretrained(place) if isinstance(place, Path) else place)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return sample(pipe, [Request("a cat", 3)], Sampling(3, guidance, height=size, width=size))


# ---- samplings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_sampling_takes_the_steps_that_diffusers_takes(kind):
    """DDIM with η = 0, Euler for flows: the same latents, step by step, for the same predictions."""
    noise = flow_scheduler(shift=1.0) if kind == "flow" else scheduler(kind)
    noising, steps = Noising(noise, LATENTS, torch.device("cpu")), 5
    running = Trajectories(noising, UNetEnsemble.interface, SHAPE, 3, 2, steps, None, seed=0)
    rng = torch.Generator().manual_seed(0)
    _, _, batch = running.draw(0)
    running.end[0] = steps
    grid = running.steps[0].clone()
    latents = noising.noisy(batch.latents, batch.noise, batch.steps)
    for place in range(steps - 1):
        predictions = torch.randn(latents.shape, generator=rng)
        running.advance(0, 0, predictions)
        _, _, batch = running.draw(GROUPS)
        assert torch.equal(batch.steps, grid[:, place + 1])
        now = noising.noisy(batch.latents, batch.noise, batch.steps)
        for row in range(2):
            before, after = grid[row, place], grid[row, place + 1]
            stock = _stock_step(noise, noising, predictions[row : row + 1], latents[row : row + 1], before, after)
            assert torch.allclose(now[row : row + 1], stock, atol=2e-4, rtol=1e-3)
        latents = now


def _stock_step(noise, noising, prediction, latents, before, after):
    """One step of the library's own scheduler between two timesteps."""
    if isinstance(noise, FlowMatchEulerDiscreteScheduler):
        sigmas = noising.noise[before], noising.noise[after]
        return latents + (sigmas[1] - sigmas[0]) * prediction
    stock = DDIMScheduler.from_config(noise.config, clip_sample=False, set_alpha_to_one=False)
    stock.num_inference_steps = 1
    stock._get_variance = lambda *_: 0
    stock.register_to_config(num_train_timesteps=int(before - after))  # the step that step() goes back
    return stock.step(prediction, int(before), latents).prev_sample


def test_guidance_leads_a_sampling_and_both_predictions_are_trained():
    noising = Noising(scheduler(), LATENTS, torch.device("cpu"))
    pair, plain = (Trajectories(noising, UNetEnsemble.interface, SHAPE, 5, samples, 4, guidance, seed=3) for samples, guidance in ((4, 2.5), (2, None)))
    rows, dropped, batch = pair.draw(0)
    single = plain.draw(0)
    assert rows == [row for row in single[0] for _ in (0, 1)]
    assert dropped.tolist() == [False, True, False, True]
    assert torch.equal(batch.noise[0::2], single[2].noise)
    assert torch.equal(batch.noise[1::2], single[2].noise)
    cond, uncond = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    pair.end[0] = plain.end[0] = 4
    pair.advance(0, 0, torch.stack([cond, uncond], 1).flatten(0, 1))
    plain.advance(0, 0, uncond + 2.5 * (cond - uncond))
    assert torch.allclose(pair.clean, plain.clean)
    assert torch.allclose(pair.noise, plain.noise)


def test_parts_of_a_step_may_be_advanced_one_by_one():
    noising = Noising(scheduler(), LATENTS, torch.device("cpu"))
    whole, parts = (Trajectories(noising, UNetEnsemble.interface, SHAPE, 5, 8, 4, 3.0, seed=3) for _ in (0, 1))
    whole.draw(0), parts.draw(0)
    predictions = torch.randn(8, *SHAPE)
    whole.advance(0, 0, predictions)
    parts.advance(0, 4, predictions[4:])
    parts.advance(0, 0, predictions[:4])
    assert all(torch.equal(value, parts.state()[name]) for name, value in whole.state().items())


def test_samplings_end_at_different_times_and_begin_anew_with_noise_alone():
    noising = Noising(scheduler(), LATENTS, torch.device("cpu"))
    running = Trajectories(noising, UNetEnsemble.interface, SHAPE, 50, 16, 5, None, seed=1)
    levels = []
    for step in range(GROUPS * 20):
        rows, _, batch = running.draw(step)
        fresh = running.place[step % GROUPS] == 0
        noisy = noising.noisy(batch.latents, batch.noise, batch.steps)
        assert torch.allclose(noisy[fresh], batch.noise[fresh], atol=1e-5)  # as stock pipelines begin
        assert (batch.steps[fresh] >= 0.8 * noising.steps - 1).all()
        running.advance(step, 0, torch.zeros(16, *SHAPE))
        levels.append(batch.steps.float().std().item())
    assert min(levels[GROUPS * 5 :]) > 200  # of 1,000 timesteps: a batch holds all levels
    assert len(set(rows)) > 8


def test_a_sampling_that_is_lost_begins_anew():
    noising = Noising(scheduler(), LATENTS, torch.device("cpu"))
    running = Trajectories(noising, UNetEnsemble.interface, SHAPE, 5, 2, 4, None, seed=1)
    running.draw(0)
    running.end[0] = 4
    running.advance(0, 0, torch.stack([torch.zeros(SHAPE), torch.full(SHAPE, torch.inf)]))
    _, _, batch = running.draw(GROUPS)
    assert batch.latents.isfinite().all()
    assert batch.noise.isfinite().all()
    assert running.place[0].tolist() == [1, 0]


def test_steps_are_spread_from_noise_to_image():
    noising = Noising(scheduler(), LATENTS, torch.device("cpu"))
    grid = spaced(noising, 10, torch.rand(64, 1, generator=torch.Generator().manual_seed(0)))
    assert (grid[:, 1:] < grid[:, :-1]).all()
    assert np.histogram(grid, 10, (0, noising.steps))[0].min() > 50
    assert ((grid[:, 0] >= 900) & (grid[:, 0] < 1000)).all()


# ---- the teacher --------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teachers, captions, tmp_path):
    """An ensemble of one expert twice answers as that expert does, with the text encoder of each."""
    expert = saved(sd(5, **ONE), tmp_path / "expert")
    Ensemble.from_experts([f"one={expert}", f"two={expert}"], aggregator="mean").save(tmp_path / "twice")
    settings = DistillSettings(
        ensemble=str(tmp_path / "twice"), data=str(captions), output=str(tmp_path / "out"), student="one",
        batch_size=4, held_out=2, steps=2, lr=0, device="cpu", trajectory_steps=3, recombine=0,
    )  # fmt: skip
    record = distill(settings)
    assert record["held_out_loss"]["student"]["value"] < 1e-10
    assert record["history"][-1]["training_loss"] < 1e-10


def test_the_teacher_answers_with_guidance_in_one_pass(teachers):
    ensemble = Ensemble.load(teachers("one"))
    teacher = Teacher(ensemble, torch.device("cpu"))
    noising = Noising(ensemble.frame.scheduler, LATENTS, torch.device("cpu"))
    conditions = Conditions(ensemble.pipeline(), ensemble.denoiser, torch.device("cpu"))
    side = ensemble.denoiser.side
    noisy, times = torch.randn(2, 4, side, side), noising.timesteps(torch.tensor([100, 700]))
    sizes, words = torch.zeros(2, 6), ["a cat", "a dog"]

    def answer(dropped):
        arguments = conditions(words, sizes, torch.tensor(dropped))
        return ensemble.denoiser(noisy, times, **arguments).sample

    with torch.no_grad():
        cond, uncond = answer([False, False]), answer([True, True])
    assert torch.allclose(teacher.guided(noisy, times, words, sizes, 4.0), uncond + 4 * (cond - uncond), atol=1e-5)
    assert torch.allclose(teacher.guided(noisy, times, words, sizes, None), cond, atol=1e-6)


# Of each method that can teach, options for two experts.
METHODS = {
    "single_in_ensemble": ["expert=one-1"],
    "noise_average": ["weights=1,3"],
    "feature_mean": [],
    "timestep_experts": ["table=1000-500:one-2,500-0:one-1"],
    "magicfusion": ["mode=2", "t0=500"],
}


def test_every_method_that_can_teach_is_tried():
    assert set(METHODS) == set(teaching_methods()) == {changes["method"] for changes, _ in CHANGES if "method" in changes}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_teaches_what_its_own_pipeline_predicts(name, teachers, settings):
    """At several timesteps in one batch, with captions and without, in any order."""
    ensemble = Ensemble.load(teachers("one"))
    settings = replace(settings, method=name, method_option=METHODS[name])
    method = teaching_method(ensemble, settings, 4.0)
    teacher, device = Teacher(ensemble, torch.device("cpu"), None, method), torch.device("cpu")
    noising = Noising(ensemble.frame.scheduler, LATENTS, device)
    conditions = Conditions(ensemble.pipeline(), ensemble.denoiser, device)
    side, words = ensemble.denoiser.side, ["a cat", "a dog", "two mice"]
    noisy, steps = torch.randn(3, 4, side, side), torch.tensor([100, 700, 100])
    times, sizes = noising.timesteps(steps), torch.zeros(3, 6)

    def stock(row):
        """Both predictions at one latent, in one pass, as the pipeline asks for them."""
        one = slice(row, row + 1)
        arguments = conditions(words[one] * 2, sizes[one].repeat(2, 1), torch.tensor([True, False]))
        with torch.no_grad():
            return method.denoiser(noisy[one].repeat(2, 1, 1, 1), times[row], **arguments).sample

    without, prompted = torch.stack([stock(row) for row in range(3)], 1)
    guided = teacher.guided(noisy, times, words, sizes, 4.0)
    assert torch.allclose(guided, without + 4 * (prompted - without), atol=1e-4)
    for dropped, pairs in (([False, True, False, True, False, True], 2), ([True, False, False], 1)):
        dropped, (found, at, size) = torch.tensor(dropped), (part.repeat_interleave(pairs, 0) for part in (noisy, times, sizes))
        said = [word for word in words for _ in range(pairs)]
        work = SimpleNamespace(noisy=found, timesteps=at, captions=said, sizes=size, dropped=dropped, asked=None)
        expected = torch.where(dropped.view(-1, 1, 1, 1), *(part.repeat_interleave(pairs, 0) for part in (without, prompted)))
        assert torch.allclose(teacher(work), expected, atol=1e-5)


def test_an_expert_that_is_taught_by_itself_has_nothing_to_learn(settings):
    alone = {"student": "one-1", "method": "single_in_ensemble", "method_option": ["expert=one-1"]}
    record = distill(replace(settings, **alone, lr=0, steps=2))
    assert record["held_out_loss"]["student"]["value"] < 1e-10
    assert json.loads((Path(settings.output) / "distill.json").read_text())["settings"]["method"] == "single_in_ensemble"
    assert "the method `single_in_ensemble`" in (Path(settings.output) / "README.md").read_text()


@pytest.mark.parametrize("family", PIPELINES)
def test_the_mean_of_predictions_teaches_in_every_family(family, teachers, settings):
    """Also where samplings are that the student is measured at."""
    ensemble, device = Ensemble.load(teachers(family)), torch.device("cpu")
    names = ensemble.names
    ways = [("noise_average", []), *(("single_in_ensemble", [f"expert={name}"]) for name in names)]
    mean, *alone = (
        Teacher(ensemble, device, None, teaching_method(ensemble, replace(settings, method=method, method_option=options), 3.0)) for method, options in ways
    )
    noising = Noising(ensemble.frame.scheduler, latents_of(ensemble.frame.vae), device)
    shape, data = (noising.latents.channels, 4, 4), Encoded(torch.empty(2, 0), ["a cat", "a dog"], torch.full((2, 6), 32.0))
    batch = own_samplings(mean, noising, data, shape, 2, 3.0, batch_size=2, seed=0)
    assert batch.latents.isfinite().all()
    noisy = noising.noisy(batch.latents, batch.noise, batch.steps)
    answers = [teacher.guided(noisy, noising.timesteps(batch.steps), data.captions, data.sizes, None) for teacher in (mean, *alone)]
    assert torch.allclose(answers[0], torch.stack(answers[1:]).mean(0), atol=1e-5)
    assert not torch.allclose(answers[1], answers[2], atol=1e-3)


def test_the_held_out_latents_are_those_of_the_teachers_own_samplings(teachers):
    """Each is where a stock pipeline would be after so many steps, at timesteps of its own."""
    ensemble = Ensemble.load(teachers("one"))
    noising = Noising(ensemble.frame.scheduler, LATENTS, torch.device("cpu"))
    teacher, side = Teacher(ensemble, torch.device("cpu")), ensemble.denoiser.side
    data = Encoded(torch.empty(4, 0), ["a", "b", "c", "d"], torch.zeros(4, 6))
    batch = own_samplings(teacher, noising, data, (4, side, side), 4, 3.0, batch_size=3, seed=0)
    alone = own_samplings(teacher, noising, data, (4, side, side), 4, 3.0, batch_size=1, seed=0)
    assert sorted(batch.steps.tolist()) == [125, 375, 625, 875]
    assert torch.allclose(batch.latents, alone.latents, atol=1e-4)
    noisy = noising.noisy(batch.latents, batch.noise, batch.steps)
    noise_alone = (noisy - batch.noise).flatten(1).abs().amax(1) < 1e-4
    assert noise_alone.tolist() == (batch.steps == 875).tolist()


# ---- a whole run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_students_of_every_family_load_in_diffusers(family, two_steps):
    settings, record = two_steps(family)
    folder = Path(settings.output)
    stock = type(PIPELINES[family](0)).from_pretrained(folder)
    component = FAMILIES[{"sd": "unet", "sdxl": "unet"}.get(family, family)].component
    trained = getattr(stock, component)
    unused = sum(weight.numel() for name, weight in trained.named_parameters() if "blocks.1" in name) if family in ("sd3", "qwen-image") else 0
    assert 0 <= sum(weight.numel() for weight in trained.parameters()) - record["parameters"] <= unused
    assert set(record["held_out_loss"]) == {"trained", "student"}
    assert record["history"][-1]["step"] == 2
    assert (folder / RECORD).exists()
    assert "guidance, as any model" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["flux", "lumina2"])
def test_the_single_file_of_a_transformer_is_the_folders_bit_for_bit(family, two_steps, tmp_path):
    whole, _ = two_steps(family)
    alone = replace(whole, output=str(tmp_path / "student.safetensors"))
    distill(alone)
    one, other = load_expert(whole.output).model, load_expert(alone.output, config=whole.output).model
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    with safe_open(alone.output, framework="pt") as file:
        assert json.loads(file.metadata()[KEY])["guidance_in"] is None
    assert sorted(path.name for path in alone.folder.iterdir()) == ["distill.json", "log.jsonl"]


def test_a_file_that_would_lose_the_mean_of_text_encoders_is_refused_before_training(settings, tmp_path):
    places = [str(saved(flux(seed, text_seed=seed), tmp_path / f"flux-{seed}")) for seed in (1, 2)]
    Ensemble.from_experts(places, aggregator="mean").save(tmp_path / "teacher")
    asked = replace(settings, ensemble=str(tmp_path / "teacher"), output=str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="text encoders of 'flux-2' are others than those of 'flux-1'.*give a folder"):
        plan_distill(asked)
    plan_distill(replace(asked, student="flux-2"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_is_the_folder_bit_for_bit(family, two_steps, tmp_path):
    whole, _ = two_steps(family)
    alone = replace(whole, output=str(tmp_path / "student.safetensors"))
    distill(alone)
    one, other = (Ensemble.from_experts([place], aggregator="mean", placement="out").experts[0] for place in (whole.output, alone.output))
    for mine, theirs in ((one.model, other.model), *zip(one.text_encoders, other.text_encoders, strict=True), (one.load_vae(), other.load_vae())):
        states = mine.state_dict(), theirs.state_dict()
        assert states[0].keys() - states[1].keys() <= {"text_model.embeddings.position_ids"}
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert kind(one) == kind(other)
    with safe_open(alone.output, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
        names = set(file.keys())
    assert said["guidance_in"] is None
    assert "teacher" in said
    assert any(name.startswith("model.diffusion_model.input_blocks.0.0.") for name in names)
    assert any(name.startswith("first_stage_model.") for name in names)


def kind(expert):
    return expert.scheduler.config.prediction_type


def test_v_prediction_is_marked_for_other_programs(captions, tmp_path):
    places = [str(saved(sd(seed, **ONE), tmp_path / f"v{seed}")) for seed in (1, 2)]
    for place in places:
        file = Path(place) / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    Ensemble.from_experts(places, aggregator="mean").save(tmp_path / "teacher")
    output = tmp_path / "student.safetensors"
    given = {"batch_size": 4, "held_out": 2, "steps": 1, "device": "cpu", "trajectory_steps": 2}
    distill(DistillSettings(ensemble=str(tmp_path / "teacher"), data=str(captions), output=str(output), **given))
    with safe_open(output, framework="pt") as file:
        assert "v_pred" in set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_both_forms_of_a_lora_draw_the_same_in_diffusers(family, teachers, settings, tmp_path):
    folder = replace(settings, ensemble=str(teachers(family)), resolution=32, lora=2, student=f"{family}-1", lr=1e-2, steps=2)
    file = replace(folder, output=str(tmp_path / "lora.safetensors"))
    distill(folder), distill(file)
    base = teachers(family).parent / f"{family}-1"
    kinds = type(PIPELINES[family](0))
    pictures = [drawn(base, kind=kinds)]
    for place in (f"{folder.output}/pytorch_lora_weights.safetensors", file.output):
        pipe = kinds.from_pretrained(base)
        pipe.load_lora_weights(place)
        assert pipe.get_list_adapters() != {}
        pictures.append(drawn(pipe))
        ours = Ensemble.from_experts([f"tuned={base}+{place}"], aggregator="mean", placement="out")
        assert np.abs(drawn(ours.pipeline()).astype(int) - pictures[-1]).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[1], pictures[2])
    names = set(load_file(file.output))
    expected = "lora_unet_input_blocks_" if family == "sdxl" else "lora_unet_down_blocks_"
    assert any(name.startswith(expected) for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"weight", "alpha"}


KOHYA = {
    **{family: PIPELINES[family] for family in ("sd3", "flux", "qwen-image", "krea2", "lumina2")},
    "flux2": klein_pipeline,
    "chroma": chroma_pipeline,
    "z-image": z_image_pipeline,
    "qwen-image-2.1": qwen_image_21_pipeline,
}


@pytest.mark.parametrize("family", KOHYA)
def test_loras_of_transformers_in_kohyas_names_are_read_back_as_they_were(family, tmp_path):
    base = saved(KOHYA[family](0), tmp_path / "base")
    plain, tuned = (load_expert(str(base), torch.float32).model for _ in range(2))
    for parameter in add_lora(tuned, 2).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors, start = lora_tensors(tuned), "transformer."
    factors = {
        name.removeprefix(start).removesuffix(A): (down, tensors[name.removesuffix(A) + B]) for name, down in tensors.items() if name.endswith(A)
    }
    save_kohya(tmp_path / "lora.safetensors", plain, factors)
    read = fuse(load_expert(f"{base}+{tmp_path / 'lora.safetensors'}", torch.float32).model).state_dict()
    for name, weight in plain.state_dict().items():
        layer = name.removesuffix(".weight")
        down, up = factors.get(layer, (None, None))
        expected = weight if down is None else weight + up @ down
        assert torch.allclose(read[name], expected, atol=1e-5)
    assert len(factors) >= 4


def test_a_layer_without_a_name_in_other_programs_is_refused():
    model = PIPELINES["sd3"](0).transformer
    with pytest.raises(UserError, match="of pos_embed cannot be written for other programs"):
        kohya_tensors(model, {"pos_embed": (torch.zeros(2, 4), torch.zeros(4, 2))})


def test_training_brings_the_student_nearer_to_its_teacher(settings):
    record = distill(replace(settings, steps=20, lr=3e-3, ema=0.5, evaluate_every=10))
    assert record["held_out_loss"]["trained"]["value"] < 0.8 * record["held_out_loss"]["student"]["value"]


MEASURED, BETWEEN = 2, 5  # a step with a measurement; one between two, in samplings that go on
CHANGES = [  # what the state holds, or the draws depend on, with every method that can teach; and where the run is killed
    ({}, (MEASURED, BETWEEN)),
    ({"student": "one-2", "method": "noise_average"}, (BETWEEN,)),
    ({"lora": 2, "student": "one-1", "method": "timestep_experts"}, (MEASURED,)),
    ({"guidance_in": 4.0, "method": "magicfusion"}, (BETWEEN,)),
    ({"image_share": 0.5, "crops": 2, "method": "feature_mean"}, (BETWEEN,)),
    ({"image_share": 1, "method": "single_in_ensemble"}, (MEASURED,)),
]


@pytest.mark.parametrize(("changes", "steps"), CHANGES)
def test_a_killed_run_comes_to_the_same_student(changes, steps, settings, images, monkeypatch, tmp_path):  # noqa: F811
    data, options = str(images) if "image_share" in changes else settings.data, METHODS.get(changes.get("method"))
    settings = replace(settings, **changes, data=data, method_option=options)
    whole = distill(replace(settings, output=str(tmp_path / "whole")))
    for step in steps:
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(KeyboardInterrupt):
                distill(settings)
        assert state_file(settings).exists()
        assert distill_finished(settings) is None
    record = distill(settings)
    assert record["history"] == whole["history"]
    name = "pytorch_lora_weights.safetensors" if settings.lora else "unet/diffusion_pytorch_model.safetensors"
    mine, theirs = (load_file(Path(place) / name) for place in (settings.output, tmp_path / "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert not state_file(settings).exists()
    assert distill(settings) == json.loads(json.dumps(record))  # a finished run is read


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "qwen-image"])
def test_a_run_of_every_family_resumes(family, two_steps, monkeypatch, tmp_path):
    settings, whole = two_steps(family)
    settings = replace(settings, output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            distill(settings)
    assert distill(settings)["history"] == whole["history"]


@pytest.mark.parametrize("share", [0, 0.5])
def test_two_processes_train_what_one_trains(share, settings, images, tmp_path):  # noqa: F811
    settings = replace(settings, image_share=share, data=str(images) if share else settings.data, steps=5, evaluate_every=5)
    alone = replace(settings, output=str(tmp_path / "alone"), accumulate=2)
    several = replace(settings, output=str(tmp_path / "several"))
    one = distill(alone)
    many = in_processes(lambda: distill(several)["history"])
    assert [entry["held_out_loss"] for entry in many[0]] == [entry["held_out_loss"] for entry in many[1]]
    for mine, theirs in zip(many[0], one["history"], strict=True):
        assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)


def test_a_cache_changes_nothing(two_steps, tmp_path):
    settings, plain = two_steps("one")
    cached = distill(replace(settings, output=str(tmp_path / "cached"), cache=str(tmp_path / "cache")))
    assert cached["history"] == plain["history"]
    assert (tmp_path / "cached" / "text_encoder" / "model.safetensors").exists()


def test_images_give_their_captions(settings, images, tmp_path):  # noqa: F811
    record = distill(replace(settings, data=str(images), steps=2))
    assert record["training_images"] == 8


@pytest.mark.parametrize(("share", "batch", "images_in_it"), [(0, 4, 0), (0.5, 4, 2), (0.25, 8, 2), (0.3, 5, 1), (1, 4, 4)])
def test_samplings_of_a_batch_come_in_pairs_beside_its_images(share, batch, images_in_it, settings):
    assert replace(settings, image_share=share, batch_size=batch, data="images").images_in_batch == images_in_it


@pytest.mark.parametrize("share", [0.5, 1])
def test_images_answer_for_themselves_and_the_teacher_answers_at_samplings(share, settings, images, tmp_path, monkeypatch):  # noqa: F811
    """A student that is its teacher learns from images only; only for samplings is the teacher asked."""
    expert = saved(sd(5, **ONE), tmp_path / "expert")
    Ensemble.from_experts([f"one={expert}", f"two={expert}"], aggregator="mean").save(tmp_path / "twice")
    asked, answer = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, work: asked.append(work.asked) or answer(self, work))
    record = distill(
        replace(settings, ensemble=str(tmp_path / "twice"), data=str(images), student="one", steps=2, lr=0, recombine=0, image_share=share)
    )
    assert record["held_out_loss"]["student"]["value"] < 1e-10
    assert record["history"][-1]["training_loss"] > 0.05
    in_training = [count for count in asked if count is not None]
    assert in_training == ([2, 2] if share == 0.5 else [])


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": 0}, "too small"),
        ({"method": "superdiff_or"}, "Known: single_in_ensemble"),
        ({"method_option": ["t0=5"]}, "needs a --method"),
        ({"method": "magicfusion", "method_option": ["weights=1,2"]}, "is an option of"),
        ({"method": "magicfusion", "guidance": 1.0}, "guidance 1 adds nothing"),
        ({"method": "single_in_ensemble", "method_option": ["expert=nobody"]}, "nobody"),
        ({"batch_size": 5}, "even number"),
        ({"guidance": 3.0, "guidance_in": 3.0}, "give one of them"),
        ({"objective": "mse+reward", "reward": "demo"}, "without a teacher"),
        ({"caption_dropout": 0.5}, "--caption-dropout 0.5 is of training on images"),
        ({"crops": 2}, "--crops 2"),
        ({"image_share": 0.5}, "has captions alone"),
        ({"image_share": 0.5, "data": "images", "guidance_in": 3.0}, "give one of them"),
        ({"image_share": 0.01, "data": "images"}, "leaves no images"),
        ({"image_share": 0.99, "data": "images"}, "leaves no samplings"),
        ({"frame": "somewhere"}, "the ensemble's frame"),
        ({"caption_column": "text"}, "has lines"),
        ({"prediction_type": "v_prediction"}, "the mean of the experts"),
        ({"sparsity": 0.1}, "several experts"),
        ({"student": "nowhere"}, "nowhere"),
        ({"data": "empty.txt"}, "holds no caption"),
        ({"data": "gone.txt"}, "is no file"),
        ({"data": "four.txt"}, "too few"),
        ({"ensemble": "gone"}, "gone"),
        ({"output": "there"}, "exists already"),
        ({"output": "there.safetensors"}, "exists already"),
    ],
)
def test_bad_input_gets_a_sentence(changes, words, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model_index.json").write_text("{}")
    (tmp_path / "there.safetensors").write_text("")
    with pytest.raises(UserError, match=words):
        distill(replace(settings, **changes))
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_ensemble_is_refused(settings):
    with pytest.raises(UserError, match="inside the ensemble"):
        replace(settings, output=f"{settings.ensemble}/student")


def test_a_student_of_another_architecture_is_refused(settings, tmp_path):
    other = saved(sdxl(0), tmp_path / "xl")
    with pytest.raises(UserError, match="'xl' cannot join"):
        distill(replace(settings, student=str(other)))


def test_a_student_of_another_kind_of_prediction_is_refused(settings, tmp_path):
    other = saved(sd(3), tmp_path / "v")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="v_prediction"):
        distill(replace(settings, student=str(other)))


def test_a_finished_run_with_other_options_is_refused(two_steps):
    settings, _ = two_steps("one")
    with pytest.raises(UserError, match="was finished with --steps 2"):
        distill(replace(settings, steps=1))


def test_the_card_says_how_a_student_with_guidance_in_it_is_drawn(settings):
    distill(replace(settings, steps=1, guidance_in=4.0, lora=2, student="one-1"))
    said = (settings.folder / "README.md").read_text()
    assert "Draw it with guidance 1" in said and "Use it on `one-1`" in said


def test_a_finished_run_in_another_number_format_is_refused(two_steps):
    settings, _ = two_steps("one")
    with pytest.raises(UserError, match="save_dtype|save-dtype"):
        distill(replace(settings, save_dtype="float16"))


def test_images_outside_their_folder_may_give_their_captions(settings, images):  # noqa: F811
    assert distill(replace(settings, data=str(images), steps=1, allow_outside=True, max_skipped=0.5))["steps"] == 1


def test_the_command_plans_and_trains(settings, capsys, tmp_path):
    words = ["distill", settings.ensemble, "--data", settings.data, "--output", str(tmp_path / "x"), "--device", "cpu"]
    words += ["--batch-size", "4", "--held-out", "2", "--steps", "2", "--trajectory-steps", "2", "--guidance-in", "3"]
    assert main([*words, "--dry-run"]) == 0
    assert "with guidance 3, in one pass" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    assert main(words) == 0
    assert "draw it with guidance 1" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', '{"settings": {"steps": "many"}}'])
def test_a_record_that_is_damaged_is_refused_in_a_sentence(settings, text):
    settings.folder.mkdir()
    (settings.folder / RECORD).write_text(text)
    with pytest.raises(UserError, match=r"distill\.json") as raised:
        distill(settings)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_file_that_is_gone_after_its_run_is_named(settings, tmp_path):
    settings = replace(settings, output=str(tmp_path / "x.safetensors"), steps=1)
    distill(settings)
    Path(settings.output).unlink()
    with pytest.raises(UserError, match="it is gone"):
        distill(settings)


def test_the_rate_that_is_not_given_falls_with_the_students_width(settings, teachers):
    planned = plan_distill(replace(settings, lr=None))
    widest = max(stage.channels for stage in planned.ensemble.denoiser.stages)
    assert planned.settings.lr == pytest.approx(1e-4 * 64 / widest, rel=0.01)
    given = replace(settings, lr=None, steps=1)
    record = distill(given)
    assert record["settings"]["lr"] == planned.settings.lr
    assert distill(given) == json.loads(json.dumps(record))
    with pytest.raises(UserError, match="lr"):
        distill(replace(given, lr=0.5))


def test_missing_captions_are_put_together_from_two(settings, tmp_path):
    captions = [f"a {colour} {thing} on a {ground} table" for colour, thing, ground in zip("rgbyo", "12345", "vwxyz", strict=True)]
    made = recombined(captions, 40, ["a r 2 on a w table"], 0)
    assert len(made) == len(set(made)) == 40
    assert not {*captions, "a r 2 on a w table"} & {*made}
    words = {(before, after) for caption in captions for before, after in pairwise(caption.split())}
    assert all((before, after) in words for caption in made for before, after in pairwise(caption.split()))
    assert made == recombined(captions, 40, ["a r 2 on a w table"], 0) != recombined(captions, 40, [], 1)
    assert recombined(["one two", "three four"], 5, [], 0) == []
    (tmp_path / "five.txt").write_text("\n".join(captions * 2))
    record = distill(replace(settings, data=str(tmp_path / "five.txt"), recombine=30, steps=1))
    assert record["training_images"] == 30
