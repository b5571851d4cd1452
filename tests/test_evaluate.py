"""Comparisons from end to end, on tiny real experts: the same noise for all, resumable, and nothing finished is lost."""

import gc
import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from test_training import once
from tiny import ONE_LEVEL, sd_pipeline

from afa.checkpoint.manifest import read_manifest
from afa.cli.main import main
from afa.denoiser.base import EnsembleDenoiser
from afa.errors import UserError
from afa.evaluation import run as comparison
from afa.evaluation.compare import analyse
from afa.evaluation.controls import _merged_again, weighted_merge
from afa.evaluation.plan import plan
from afa.evaluation.report.headline import headlines
from afa.evaluation.results import Results
from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.setup import Setup
from afa.evaluation.students import student_rows
from afa.evaluation.untrained import merged_sampler
from afa.experts.load import load_expert
from afa.sampling.image_files import ImageFile
from afa.sampling.sample import Request
from afa.training.finetune import fuse_lora
from afa.training.run import train
from afa.training.settings import TrainSettings

SCORER = """
import numpy as np
def score(images, captions):
    return {"light": images.mean((1, 2, 3)) / 255, "words": np.asarray([len(caption) for caption in captions])}
def features(images):
    return images.mean((1, 2))
"""
METHODS = ["weighted", "prompt_router", "prediction_router", "best_of_n"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two experts, ten captioned images, an ensemble trained for two steps, a file of prompts, a scorer; only to be read."""
    return once("world", lambda: write_world(tmp_path_factory.mktemp("world")))


def write_world(folder):
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    lines = []
    for index in range(10):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "data" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    small = {"aggregator": "sabw", "hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 2, "lr": 1e-2}
    experts = [str(folder / "photo"), str(folder / "paint")]
    train(TrainSettings(experts=experts, data=str(folder / "data"), output=str(folder / "afa"), device="cpu", **small))
    (folder / "prompts.txt").write_text("a cat\na dog and a bird\n")
    (folder / "scorer.py").write_text(SCORER)
    return folder


def small_settings(world, output, **changes):
    given = {
        "ensemble": str(world / "afa"),
        "train_data": str(world / "data"),
        "output": str(output),
        "protocol": str(world / "prompts.txt"),
        "methods": METHODS,
        "scorer": str(world / "scorer.py"),
        "images_per_prompt": 2,
        "steps": 2,
        "guidance": 2.0,
        "width": 32,
        "height": 32,
        "tuning": 2,
        "device": "cpu",
    }
    return EvaluateSettings(**{**given, **changes})


@pytest.fixture
def settings(world, tmp_path):
    return small_settings(world, tmp_path / "out")


def images(settings):
    """Every image of a comparison, by its place."""
    return {path.relative_to(settings.output): np.asarray(Image.open(path)) for path in sorted(Path(settings.output).rglob("images/**/*.png"))}


@pytest.fixture(scope="module")
def alive():
    """How many ensembles were in memory after each row while `done` was made."""
    return []


@pytest.fixture(scope="module")
def done(world, alive, tmp_path_factory):
    """One comparison that is finished, to be read."""
    settings, free = small_settings(world, tmp_path_factory.mktemp("done") / "out", seeds=2), comparison.free_memory

    def counted():
        free()
        alive.append(sum(isinstance(thing, EnsembleDenoiser) for thing in gc.get_objects()))

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries' objects that are looked at
        patch.setattr(comparison, "free_memory", counted)
        return settings, evaluate(settings)


def test_every_method_has_a_score_for_every_image(done):
    _, results = done
    assert [method.name for method in results.methods] == ["single:photo", "single:paint", "weighted", "prompt_router", "prediction_router", "afa", "best_of_n"]
    assert results.errors == []
    for method in results.methods:
        for run in method.runs:
            assert set(run.scores) == {"light", "words"}
            assert all(len(values) == len(results.items) == 4 for values in run.scores.values())
            assert len(run.seconds) == 4


def test_what_is_trained_has_a_run_for_every_seed(done):
    settings, results = done
    trained = {method.name: method for method in results.methods if method.trained_parameters}
    assert set(trained) == {"prompt_router", "prediction_router", "afa"}
    assert all([run.seed for run in method.runs] == [0, 1] for method in trained.values())
    for name, seed in (("prediction_router/seed-0", 0), ("prediction_router/seed-1", 1), ("afa/seed-1", 1)):
        assert read_manifest(Path(settings.output) / "trained" / name).training["settings"]["seed"] == seed


def test_no_score_is_of_another_images_caption(done):
    _, results = done
    for method in results.methods:
        assert method.runs[0].scores["words"] == [len(item.caption) for item in results.items]


def test_the_oracle_is_the_best_expert_image_by_image(done):
    _, results = done
    by_name = {method.name: method.runs[0].scores["light"] for method in results.methods}
    assert by_name["best_of_n"] == list(map(max, zip(by_name["single:photo"], by_name["single:paint"], strict=True)))


def test_results_come_back_from_their_file(done):
    settings, results = done
    assert Results.load(Path(settings.output)) == results


def test_a_finished_comparison_is_only_read(done, monkeypatch):
    settings, results = done
    monkeypatch.setattr("afa.evaluation.images.draw", lambda *given: pytest.fail("made again"))
    monkeypatch.setattr("afa.evaluation.trained.train", lambda *given: pytest.fail("trained again"))
    monkeypatch.setattr("afa.evaluation.prompt_router.train_prompt_router", lambda *given: pytest.fail("trained again"))
    again = evaluate(settings)
    assert again is not None
    assert [asdict(method) for method in again.methods] == [asdict(method) for method in results.methods]


def test_a_rows_models_are_freed_before_the_next_row(done, alive):
    """Models hold themselves by cycles: without a collection, those of all rows would be in memory at once."""
    assert len(alive) > 3
    assert max(alive) == alive[0]


def test_methods_can_be_added_later(done, tmp_path):
    settings, first = done
    later = evaluate(replace(settings, output=str(shutil.copytree(settings.output, tmp_path / "out")), methods=[*METHODS, "slerp"]))
    assert later is not None
    assert [method.name for method in later.methods if method not in first.methods] == ["slerp"]
    assert [method for method in later.methods if method.name != "slerp"] == first.methods


def test_an_interrupted_comparison_goes_on_to_the_same_images(settings, monkeypatch):
    save, calls = ImageFile.save, []

    def interrupted(*given, **notes):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save(*given, **notes)

    small = replace(settings, batch_size=1, methods=["weighted"], images_per_prompt=1, tuning=0)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(small)
    evaluate(small)
    found = images(small)
    shutil.rmtree(small.output)
    evaluate(small)
    whole = images(small)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[path], whole[path]) for path in whole)


def test_a_metric_that_fails_costs_only_itself(settings, world, tmp_path):
    failing = SCORER.replace("def score", "calls = []\ndef score")
    failing = failing.replace("    return {", "    calls.append(1)\n    assert len(calls) != 3\n    return {", 1)
    (tmp_path / "bad.py").write_text(failing)
    results = evaluate(replace(settings, scorer=str(tmp_path / "bad.py"), methods=["weighted"], images_per_prompt=1, tuning=0))
    assert results is not None
    assert len(results.errors) == 1 and "AssertionError" in results.errors[0]
    assert "assert len(calls) != 3" in (Path(settings.output) / "errors.log").read_text()
    assert sum(bool(run.scores) for method in results.methods for run in method.runs) == len(results.methods) - 1


def test_a_method_that_cannot_be_done_is_left_out_of_all_but_not_of_a_list(settings):
    with pytest.raises(UserError, match="task arithmetic: it needs the model the experts were tuned from; give it with --base"):
        evaluate(replace(settings, methods=["task_arithmetic"]))
    with pytest.raises(UserError, match="LoRAtorio: it needs the model the experts were tuned from; give it with --base"):
        evaluate(replace(settings, methods=["loratorio"]))
    assert not list(Path(settings.output).rglob("*.png"))  # it is said before anything is drawn


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["wieghted"]}, "did you mean 'weighted'"),
        ({"protocol": "scenez"}, "did you mean 'scenes'"),
        ({"scorer": "nowhere.py"}, "--scorer nowhere.py is no Python file"),
        ({"metrics": ["fdi"]}, "did you mean 'fid'"),
        ({"metric_weights": ["fid"]}, "--metric-weights fid names no metric; write METRIC=PATH"),
        ({"experts": ["photo"]}, "--experts photo names no expert; write NAME=photo"),
    ],
)
def test_bad_input_is_one_sentence_before_any_image(settings, changes, sentence):
    with pytest.raises(UserError) as raised:
        evaluate(replace(settings, **changes))
    assert sentence in str(raised.value)
    assert not list(Path(settings.output).rglob("*.png"))


def test_a_comparison_begun_otherwise_is_refused(done):
    settings, _ = done
    with pytest.raises(UserError, match=r"was begun with --steps 2 \(now 3\)"):
        evaluate(replace(settings, steps=3))


def test_a_folder_of_something_else_is_refused(settings):
    Path(settings.output).mkdir()
    (Path(settings.output) / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        evaluate(settings)


def test_a_dry_run_leaves_nothing_behind(settings):
    facts = plan(settings)
    assert facts["images_to_judge"] == 4 * 6 and facts["images_to_choose_options"] == 2 * (2 + 3)  # two experts, three shares
    assert facts["images"] == 34
    assert not Path(settings.output).exists()


@pytest.fixture(scope="module")
def controls(world, tmp_path_factory):
    """A finished comparison with LoRAs on the merge, to be read."""
    methods = ["finetune_merge_compute", "finetune_merge"]
    settings = small_settings(world, tmp_path_factory.mktemp("controls") / "out", methods=methods, images_per_prompt=1, seeds=2, steps=1, tuning=1)
    return settings, evaluate(settings)


def test_loras_to_equal_compute_go_on_from_those_to_equal_steps(controls):
    settings, results = controls
    assert not results.errors
    steps, compute = (next(method for method in results.methods if method.name == name) for name in ("finetune_merge", "finetune_merge_compute"))
    assert len(steps.runs) == len(compute.runs) == 2 and steps.trained_parameters == compute.trained_parameters
    trained = Path(settings.output) / "trained"
    records = {name: json.loads((trained / name / "lr-1" / "seed-0" / "finetune.json").read_text()) for name in (steps.name, compute.name)}
    assert records[compute.name]["steps"] > records[steps.name]["steps"] == 2
    assert records[compute.name]["history"][: len(records[steps.name]["history"])] == records[steps.name]["history"]
    assert not list(trained.rglob("*.pt"))


def test_merge_and_continue_has_two_rounds_that_cost_what_one_does(controls, settings):
    results = evaluate(replace(settings, methods=["merge_and_continue"], images_per_prompt=1, steps=1, tuning=0))
    assert not results.errors
    one = next(method for method in controls[1].methods if method.name == "finetune_merge_compute")
    rounds = next(method for method in results.methods if method.name == "merge_and_continue")
    assert rounds.training_steps == one.training_steps and rounds.trained_parameters == 2 * one.trained_parameters
    first, second = (Path(settings.output) / "trained" / "merge_and_continue" / "lr-1" / "seed-0" / f"round-{number}" for number in (1, 2))
    steps = [json.loads((folder / "finetune.json").read_text())["steps"] for folder in (first, second)]
    assert sum(steps) == one.training_steps and max(steps) - min(steps) <= 1

    setup = Setup(settings)
    again, merge = _merged_again(setup, first / "pytorch_lora_weights.safetensors"), weighted_merge(setup)
    key = "down_blocks.0.resnets.0.conv1.weight"
    mean = merge.model.state_dict()[key].clone()
    assert torch.allclose(mean, torch.stack([expert.model.state_dict()[key] for expert in setup.ensemble.experts]).mean(0), atol=1e-6)
    fuse_lora(merge.model, first / "pytorch_lora_weights.safetensors")
    trained = merge.model.state_dict()[key]
    assert torch.allclose(again.model.state_dict()[key], (trained + mean) / 2, atol=1e-6) and not torch.allclose(trained, mean, atol=1e-5)


def test_two_processes_make_the_images_of_one(settings, done, capfd):
    """Real processes, as accelerate launch starts them: the same images, the same results, printed once."""
    flags = ["--methods", "weighted", "--images-per-prompt", "2", "--steps", "2", "--guidance", "2", "--width", "32", "--height", "32"]
    places = ["--ensemble", settings.ensemble, "--protocol", settings.protocol, "--scorer", settings.scorer, "--output", settings.output]
    codes = in_processes(lambda: main(["evaluate", *flags, *places, "--train-data", settings.train_data, "--tuning", "2", "--device", "cpu", "--json"]))
    assert codes == [0, 0]
    assert len(json.loads(capfd.readouterr().out)["methods"]) == 4
    one = images(done[0])
    for path, image in images(settings).items():
        assert np.abs(image.astype(int) - one[path]).max() <= 1, path  # another batch size rounds otherwise
    assert len(images(settings)) == 4 * 4


def test_the_command_prints_the_list_of_methods(capsys):
    assert main(["evaluate", "--ensemble", "x", "--protocol", "x", "--output", "x", "--methods", "list"]) == 0
    assert "prediction_router" in capsys.readouterr().out


STUDENTS = ["weighted", "distilled", "distilled_lora", "distilled_guided"]


@pytest.fixture(scope="module")
def students(world, tmp_path_factory):
    """A comparison with students that is finished, to be read."""
    settings = small_settings(
        world, tmp_path_factory.mktemp("students") / "out", methods=STUDENTS, seeds=2, steps=1, distill_steps=1, images_per_prompt=1, tuning=0
    )
    return settings, evaluate(settings)


def test_students_are_distilled_from_the_ensemble_of_their_seed_and_drawn_as_they_were_trained(students):
    settings, results = students
    assert not results.errors
    rows = {method.name: method for method in results.methods if method.name in STUDENTS}
    assert list(rows) == STUDENTS
    assert all([run.seed for run in row.runs] == [0, 1] for name, row in rows.items() if name != "weighted")
    trained = Path(settings.output) / "trained"
    records = {name: json.loads(next((trained / name).glob("lr-*/seed-1/distill.json")).read_text())["settings"] for name in STUDENTS[1:]}
    assert {Path(record["ensemble"]).parts[-2:] for record in records.values()} == {("afa", "seed-1")}
    assert records["distilled"]["guidance"] == records["distilled_guided"]["guidance_in"] == 2.0
    assert records["distilled_lora"]["lora"] > 0 and records["distilled_guided"]["guidance"] is None
    again = evaluate(settings)  # a finished comparison is read
    assert [method.name for method in again.methods] == [method.name for method in results.methods]

    setup = Setup(settings)
    row = next(row for row in student_rows(setup) if row.name == "distilled_guided")
    student = load_expert(str(trained / "distilled_guided" / "lr-10" / "seed-0"), torch.float32)
    drawn = row.sampler({"lr": 10.0}, 0)([Request("a cat", 7)], replace(setup.sampling, guidance=2.0))
    assert np.array_equal(drawn, merged_sampler(setup, student)([Request("a cat", 7)], replace(setup.sampling, guidance=1.0)))


def test_the_report_says_what_share_of_the_gain_a_student_keeps(students):
    (one,) = analyse([students[1]])
    said = [dict(found.kinds)["One model out"] for found in headlines(one)]
    assert all(sentence.startswith("share of the gain over the best merge, ") for sentence in said)
    assert all("AFA in one model" in sentence for sentence in said)


def test_a_student_with_guidance_in_it_needs_guidance(settings):
    with pytest.raises(UserError, match="drawn without"):
        evaluate(replace(settings, methods=["distilled_guided"], guidance=1.0, tuning=0, distill_steps=1))
