"""The embedded world and the demonstration on it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from afa import Ensemble
from afa.demo.data import ASSETS, BASE, EXPERTS, RECORD
from afa.demo.scenes import DOMAINS, MIXED, parse, render, sample_scenes
from afa.demo.scorer import CLASSES, AttributeScorer, labels, network
from afa.demo.worlds import FAR, NEAR, WORLDS, load_scorer
from afa.errors import UserError
from afa.files import sha256

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_world.parts import degrade


@pytest.mark.parametrize("domain", [*DOMAINS, "mixed", "union"])
def test_a_caption_says_everything_about_its_scene(domain):
    for scene in sample_scenes(domain, 200, 1):
        assert parse(scene.caption) == scene


@pytest.mark.parametrize("caption", ["", "a red star", "a red star left of a blue cat on a dotted mint background"])
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption of the far world"):
        parse(caption)


def test_mixed_scenes_lie_outside_curves_and_angles():
    for scene in sample_scenes("mixed", 100, 2):
        shapes = {scene.first.shape, scene.second.shape}
        assert not any(shapes <= set(domain.first) and scene.texture in domain.textures for name, domain in DOMAINS.items() if name != "patterns")
        assert scene.texture in MIXED.textures


def test_a_render_depends_on_its_seed_only():
    scenes = sample_scenes("mixed", 3, 3)
    first, second = list(FAR.render_all(scenes, 4)), list(FAR.render_all(scenes[:2], 4))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=False))
    assert not np.array_equal(first[0], render(scenes[0], np.random.default_rng(99)))


def test_scores_count_six_attributes():
    """A network that always gives the right answer for one scene, and none for objects elsewhere."""
    scene = sample_scenes("mixed", 1, 5)[0]
    truth = labels([scene])[0]
    net = network()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    start = 0
    for question, answers in enumerate(CLASSES.values()):
        net[-1].bias.data[start + truth[question]] = 1.0
        start += len(answers)
    scorer = AttributeScorer(net)
    image = np.zeros((1, 64, 64, 3), np.uint8)
    assert {name: float(value[0]) for name, value in scorer.score(image, [scene.caption]).items()} == dict.fromkeys(
        ("attributes", "shapes", "colours", "texture", "ground", "all"), 1.0
    )
    other = scene.caption.replace(scene.ground, "grey" if scene.ground != "grey" else "tan")
    scores = scorer.score(image, [other])
    assert scores["attributes"][0] == pytest.approx(5 / 6) and scores["ground"][0] == 0 and scores["all"][0] == 0


def test_the_embedded_scorer_is_exact_on_unseen_renders():
    scorer = load_scorer(FAR)
    scenes = sample_scenes("union", 150, 31337) + sample_scenes("mixed", 150, 31337)
    images, captions = np.stack(list(FAR.render_all(scenes, 31337))), [scene.caption for scene in scenes]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    spoilt = ((degrade(pixels, torch.Generator().manual_seed(1)) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert scorer.score(images, captions)["attributes"].mean() >= 0.97
    assert scorer.score(spoilt, captions)["attributes"].mean() >= 0.90
    assert scorer.score(images, captions[1:] + captions[:1])["attributes"].mean() < 0.6  # crossed pairs score badly
    assert scorer.features(images[:3]).shape == (3, 128)


def test_the_embedded_experts_form_an_ensemble():
    ensemble = Ensemble.from_experts([str(path) for path in EXPERTS.values()], hidden=8, heads=2)
    assert ensemble.names == tuple(EXPERTS) and len(ensemble.denoiser.stages) == 9
    assert len(ensemble.text_encoders[0].encoders) == 2  # one expert has fine-tuned its own; the others share
    assert ensemble.text_encoders[0].of_expert == [0, 0, 1]


def test_the_world_is_small_and_says_how_it_was_made():
    """The near world adds at most 12 MiB: what both worlds or several models share, above all the VAE, is stored once by git."""
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    near = {path for path in files if path.relative_to(ASSETS).parts[0].startswith(NEAR.prefix)}
    far = {sha256(path): path.stat().st_size for path in files if path not in near}
    assert sum(path.stat().st_size for path in files if path not in near) < 28e6
    assert sum({sha256(path): path.stat().st_size for path in near if sha256(path) not in far}.values()) <= 12 * 2**20
    record = json.loads(RECORD.read_text())
    steps = {name: record[name]["steps"] for name in EXPERTS}
    assert len(set(steps.values())) == 1  # equal effort
    assert all(record[name]["losses"] for name in (*EXPERTS, "base", "scorer", "text", "vae")) and BASE.is_dir()


def test_the_worlds_name_no_place_of_the_machine_they_were_made_on():
    files = [path for path in ASSETS.rglob("*.json") if path.name != "tokenizer.json"]
    assert len(files) > 30
    for file in files:
        text = file.read_text()
        assert str(ASSETS) not in text and '": "/' not in text and ' "/' not in text, file


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_built_from_nothing_and_resumes(name, tmp_path):
    from scripts.demo_world.build import build
    from scripts.demo_world.worlds import PLANS

    world, plan = WORLDS[name], PLANS[name]
    schedules = ("base_steps", "expert_steps", "scorer_steps", "reward_steps")
    plan = replace(plan, **{kind: replace(getattr(plan, kind), batch=4) for kind in schedules})
    build(plan, tmp_path / "world", tmp_path / "work", quick=900)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}
    build(plan, tmp_path / "world", tmp_path / "work", quick=900)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")} == before  # nothing was trained twice
    ensemble = Ensemble.from_experts([str(tmp_path / "world" / f"{world.prefix}{name}") for name in world.experts], aggregator="mean")
    assert len(ensemble.names) == 3


def test_demo_ends_with_a_table_and_a_page_that_needs_nothing(tmp_path, capsys):
    from afa.cli.main import main

    arguments = ["demo", "--output", str(tmp_path / "demo"), "--prompts", "2", "--train-images", "8", "--train-steps", "2", "--steps", "2"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for method in (*EXPERTS, "weight average", "untrained mean", "prediction router", "AFA"):
        assert method in said
    assert "n = 2 scenes" in said and "On 2 mixed scenes AFA is" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 2 * 7 + 2 * 2 and "http" not in page.replace("http-equiv", "")
    before = (tmp_path / "demo" / "ensemble" / "afa.json").stat().st_mtime_ns
    assert main([*arguments, "--json"]) == 0  # everything is there: only scored and reported again
    assert (tmp_path / "demo" / "ensemble" / "afa.json").stat().st_mtime_ns == before
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all({"value", "low", "high", "n"} <= set(row["attributes"]) for row in rows) and len(rows) == 7
    assert main([*arguments, "--seed", "1"]) == 2
    assert "--seed 0 (now 1)" in capsys.readouterr().err


def test_captions_of_another_world_are_one_sentence():
    from afa.demo.metric import make
    from afa.metrics.base import Picture
    from afa.metrics.registry import Resources

    with pytest.raises(UserError, match="metric 'attributes' judges scenes of the far world only: 'a cat' is not a caption"):
        make(Resources(None, torch.device("cpu"))).score([Picture(np.zeros((64, 64, 3), np.uint8), "a cat", 0)])
