"""Screening from folders to a page: one expert in memory at a time, resumable, for every family; what bad input says."""

import json
import shutil

import numpy as np
import pytest
import torch
from original_layout import write_single_file
from PIL import Image
from tiny import ONE_LEVEL, sd_pipeline
from tiny_loras import write_lora
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    SD3_SMALL,
    flux_pipeline,
    qwen_image_pipeline,
    sd3_pipeline,
)

from afa import Ensemble
from afa.cli.main import main
from afa.demo.data import EXPERTS
from afa.experts.description import describe_expert
from afa.experts.spec import ExpertSpec
from afa.latents import latents_of
from afa.screening import run
from afa.screening.plan import encoded, plan
from afa.screening.predict import ExpertPredictor, load_shared_parts
from afa.screening.report import as_html
from afa.screening.run import screen
from afa.screening.settings import ScreenSettings
from afa.training.noise import Noising

CPU = torch.device("cpu")
PIXELS = ["--resolution", "32"]  # of the small experts
FEW = ["--data", "scenes:3", "--images", "3", "--draws", "2", "--device", "cpu"]
CURVES, ANGLES, PATTERNS = (str(place) for place in EXPERTS.values())


def settings(*experts, output=None, **changes):
    return ScreenSettings(list(experts), data="scenes:3", output=None if output is None else str(output), images=3, draws=2, device="cpu", **changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three small experts with one text encoder, as folders."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("photo", "paint", "base")):
        sd_pipeline(seed, text_seed=0, **ONE_LEVEL).save_pretrained(folder / name)
    return [str(folder / name) for name in ("photo", "paint", "base")]


@pytest.fixture(scope="module")
def described():
    """The experts whose files were described while `screened` was made."""
    return []


@pytest.fixture(scope="module")
def screened(tmp_path_factory, described):
    """Two experts and a copy of the first."""
    output = tmp_path_factory.mktemp("screened") / "out"

    def counted(spec, config=None):
        described.append(spec.name)
        return describe_expert(spec, config)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("screening.plan", "merging.sources"):
            patch.setattr(f"afa.{module}.describe_expert", counted)
        return screen(settings(CURVES, PATTERNS, f"again={CURVES}", output=output)), output


def test_the_plan_the_distances_and_the_average_describe_each_experts_files_once(screened, described):
    assert "overall" in screened[0]["average"]
    assert described == ["curves", "patterns", "again"]


def test_a_duplicate_is_found_and_the_others_are_ensembled(screened):
    verdict = screened[0]["verdict"]
    assert verdict["action"] == "ensemble"
    assert set(verdict["experts"]) == {"curves", "patterns"}
    assert verdict["dropped"] == {"again": "it is curves but for rounding"}


def test_losses_are_those_of_the_training_objective(screened):
    ensemble = Ensemble.from_experts([CURVES], aggregator="mean")
    first = describe_expert(ExpertSpec.parse(CURVES)).expert
    frame = load_shared_parts(first, None, None, None, torch.float32, CPU)
    noising = Noising(frame.scheduler, latents_of(frame.vae), CPU)
    probes = encoded("scenes:3", frame.vae, noising, images=3, draws=2, seed=0, resolution=64)
    predictor = ExpertPredictor(ensemble, frame.conditions(ensemble), noising, probes, batch_size=3)  # not a divisor of a step's draws
    errors = torch.stack([predictor.predict(image).errors for image in range(3)])
    assert errors.square().mean().item() == pytest.approx(screened[0]["losses"]["curves"]["overall"]["value"], rel=1e-5)
    latents, step = probes.latents[:1], probes.steps(0, noising)[2:3]
    noise = probes.noise(0)[2, 1][None]
    noisy = noising.noisy(latents, noise, step)
    with torch.no_grad():
        states = ensemble.pipeline().encode_prompt(probes.captions[0], CPU, 1, False)[0]
        said = ensemble.denoiser.experts[0](noisy, step, states).sample
    target = noising.signal[step] * noise - noising.noise[step] * latents
    assert torch.allclose(errors[0, 2, 1], (said - target)[0], atol=1e-4)


def test_an_expert_of_another_kind_is_asked_in_the_frames_kind(tmp_path):
    """The same network told to be another kind gives other errors; told what it is, the same clean latents, so errors that scale by a known factor."""
    sd_pipeline(0, prediction_type="epsilon", **ONE_LEVEL).save_pretrained(tmp_path / "noise")
    sd_pipeline(0, prediction_type="v_prediction", **ONE_LEVEL).save_pretrained(tmp_path / "velocity")
    found = screen(settings(str(tmp_path / "noise"), str(tmp_path / "velocity"), resolution=32))
    assert "prediction_type" in found["only_predictions"][0]
    assert "cannot be made" in found["average"]
    assert found["losses"]["noise"] != found["losses"]["velocity"]


def test_an_interrupted_screening_goes_on_to_the_same_numbers(small, tmp_path, monkeypatch):
    whole = screen(settings(*small[:2], output=tmp_path / "whole", resolution=32))
    asked, predict = [], ExpertPredictor.predict

    def interrupted(self, image, features=False):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(image)
        return predict(self, image, features)

    monkeypatch.setattr(ExpertPredictor, "predict", interrupted)
    again = settings(*small[:2], output=tmp_path / "out", resolution=32)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        screen(again)
    counted = []
    monkeypatch.setattr(ExpertPredictor, "predict", lambda self, image, features=False: counted.append(image) or predict(self, image, features))
    assert screen(again) == whole
    assert len(counted) == 2 * 3 + 3 - 4  # two experts and their average, three images each, of which four were there


def test_one_expert_is_in_memory_at_a_time(small, monkeypatch):
    held = []
    free_memory = run.free_memory

    def counted():
        free_memory()
        held.append(sum(type(thing).__name__ == "UNet2DConditionModel" and not thing.conv_in.weight.is_meta for thing in _alive()))

    monkeypatch.setattr(run, "free_memory", counted)
    before = sum(type(thing).__name__ == "UNet2DConditionModel" and not thing.conv_in.weight.is_meta for thing in _alive())
    screen(settings(*small, resolution=32))
    assert held == [before] * 4  # after each expert, and after their average, none is left


def _alive():
    import gc
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]


def test_other_settings_and_changed_files_are_not_mixed(screened, small, tmp_path):
    _, output = screened
    assert main(["screen", CURVES, PATTERNS, f"again={CURVES}", *FEW, "--seed", "1", "--output", str(output)]) == 2
    shutil.copytree(small[0], tmp_path / "moving")
    experts = [str(tmp_path / "moving"), small[1]]
    assert main(["screen", *experts, *FEW, *PIXELS, "--no-average", "--output", str(tmp_path / "out")]) == 0
    file = tmp_path / "moving/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes())  # written anew, the same
    assert main(["screen", *experts, *FEW, *PIXELS, "--no-average", "--output", str(tmp_path / "out")]) == 0
    file.write_bytes(file.read_bytes()[:-1] + b"\x3e")
    assert main(["screen", *experts, *FEW, *PIXELS, "--no-average", "--output", str(tmp_path / "out")]) == 2


def test_a_changed_expert_is_named(screened, tmp_path, capsys):
    assert main(["screen", CURVES, PATTERNS, f"again={CURVES}", *FEW, "--draws", "3", "--output", str(screened[1])]) == 2
    assert "the screening in" in (said := capsys.readouterr().err)
    assert "--draws 2 (now 3)" in said


def test_the_command_leaves_a_page_and_the_same_as_json(small, tmp_path, capsys):
    command = ["screen", *small[:2], *FEW, *PIXELS, "--base", small[2], "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Learnable head-room" in printed
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out/screen.json").read_text())
    page = (tmp_path / "out/report.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "<script" not in page
    assert "What each expert adds" in page


def test_names_of_experts_and_captions_are_escaped_in_the_page(screened):
    facts = json.loads(json.dumps(screened[0]).replace("curves", "<img src=x>"))
    assert "<img" not in as_html(facts)


def test_prompts_alone_show_disagreement_and_what_cannot_be_known(small, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red star left of a blue ring\na green disc left of a red heart\n")
    command = ["screen", *small[:2], f"again={small[0]}", *PIXELS, "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--steps", "2", "--guidance", "3", "--draws", "2", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "without captioned images (--data) there is no verdict" in printed
    assert "it is photo but for rounding" in printed
    facts = json.loads((tmp_path / "out/screen.json").read_text())
    assert "losses" not in facts
    assert "head_room" not in facts
    assert len(list((tmp_path / "out/drawn").glob("*.png"))) == 2
    assert facts["predictions"][0]["bands"][0] > 0
    assert facts["predictions"][1]["bands"] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 72, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{index}.png", "text": "a cat"}) for index in range(3)))
    return folder


@pytest.mark.parametrize(
    ("make", "small"),
    [(sd3_pipeline, SD3_SMALL), (flux_pipeline, FLUX_SMALL), (qwen_image_pipeline, QWEN_IMAGE_SMALL)],
    ids=["sd3", "flux", "qwen-image"],
)
def test_every_family_is_screened(make, small, images, tmp_path):
    for seed in range(2):
        make(seed, **small).save_pretrained(tmp_path / f"expert{seed}")
    asked = ScreenSettings([str(tmp_path / f"expert{seed}") for seed in range(2)], data=str(images), images=3, draws=2, resolution=32, device="cpu")
    found = screen(asked)
    assert all(np.isfinite(loss["overall"]["value"]) for loss in found["losses"].values())
    assert len(found["features"][0]["stages"]) == len(Ensemble.from_experts([str(tmp_path / "expert0")]).denoiser.stages)
    assert all(value > 0 for value in found["features"][0]["stages"].values())


def test_single_files_are_asked_and_averaged_like_folders(images, tmp_path):
    for seed, name in enumerate(("photo", "paint")):
        pipe = sd_pipeline(seed, text_seed=0)
        pipe.save_pretrained(tmp_path / name)
        write_single_file(pipe, tmp_path / f"{name}.safetensors")
    common_options = {"data": str(images), "images": 3, "draws": 2, "resolution": 32, "device": "cpu"}
    folders = screen(ScreenSettings([str(tmp_path / name) for name in ("photo", "paint")], **common_options))
    files = [str(tmp_path / f"{name}.safetensors") for name in ("photo", "paint")]
    single = screen(ScreenSettings(files, config=str(tmp_path / "photo"), **common_options))
    apart = [one["parameters"]["pairs"][0]["stages"] for one in (single, folders)]
    assert apart[0] == pytest.approx(apart[1])
    assert [one["losses"]["photo"]["overall"]["value"] for one in (single, folders)] == pytest.approx([single["losses"]["photo"]["overall"]["value"]] * 2)
    for part in ("head_room", "average"):
        assert single[part]["overall"] == pytest.approx(folders[part]["overall"], rel=1e-3)


def test_experts_with_loras_are_asked_compared_and_averaged(images, tmp_path):
    sd_pipeline(0).save_pretrained(tmp_path / "base")
    for seed in range(2):
        write_lora("sd", tmp_path / f"style{seed}.safetensors", seed)
    experts = [f"e{seed}={tmp_path / 'base'}+{tmp_path / f'style{seed}.safetensors'}" for seed in range(2)]
    found = screen(ScreenSettings(experts, data=str(images), images=3, draws=2, resolution=32, device="cpu"))
    assert found["predictions"][0]["bands"][0] > 0
    assert found["parameters"]["pairs"][0]["distance"] > 0
    assert "overall" in found["average"]


def test_a_denoiser_alone_borrows_what_it_lacks(small, tmp_path, capsys):
    shutil.copytree(f"{small[1]}/unet", tmp_path / "alone")
    alone = str(tmp_path / "alone")
    assert main(["screen", f"one={alone}", f"two={alone}", *FEW, *PIXELS]) == 2
    assert "--frame FOLDER" in capsys.readouterr().err
    found = []
    for command in ([small[0], alone], [small[0], alone, "--frame", small[0]], small[:2]):
        assert main(["screen", *command, *FEW, *PIXELS, "--no-average", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["head_room"])
    assert found[0] == found[1] == found[2]  # the first lends the second the text encoder that both have


def test_the_plan_counts_passes_and_disk(capsys):
    assert main(["screen", CURVES, ANGLES, *FEW, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passes_each"] == 3 * 4 * 2
    found = plan(settings(CURVES, ANGLES))
    assert found.shape == (3, 4, 2, 12, 16, 16) or found.shape[:3] == (3, 4, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([CURVES, "--data", "scenes:3"], "give at least two"),
        ([CURVES, ANGLES], "give either --data, captioned images, or --prompts"),
        ([CURVES, ANGLES, "--data", "scenes:3", "--draws", "1"], "--draws 1 is too small"),
        ([CURVES, ANGLES, "--data", "nowhere"], "nowhere"),
        ([CURVES, CURVES, "--data", "scenes:3"], "two experts are called 'curves'"),
        ([CURVES, "gone/away", "--data", "scenes:3"], "gone/away"),
        ([CURVES, ANGLES, "--data", "scenes:3", "--resolution", "66"], "not a multiple of"),
        ([CURVES, ANGLES, "--data", "scenes:1"], "at least 2 are needed"),
        ([CURVES, ANGLES, "--data", "scenes:3", "--guidance", "3"], "with --data nothing is drawn"),
        ([CURVES, ANGLES, "--prompts", "nowhere.txt"], "nowhere.txt is no file"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, sentence, capsys):
    assert main(["screen", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_other_architectures_are_refused_with_every_reason(tmp_path, capsys):
    sd_pipeline(0).save_pretrained(tmp_path / "other")
    assert main(["screen", CURVES, str(tmp_path / "other"), *FEW]) == 2
    assert "'other' cannot join 'curves'" in capsys.readouterr().err
