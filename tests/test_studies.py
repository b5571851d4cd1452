"""Studies of a comparison, on tiny real experts: each part and each objective is really changed, and told against what it came from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate import settings, world  # noqa: F401 (fixtures)

from afa.checkpoint.manifest import read_manifest
from afa.cli.main import main
from afa.errors import UserError
from afa.evaluation.results import Method, Results, Run
from afa.evaluation.run import best_of_n, evaluate
from afa.evaluation.trained import FURTHER


def test_the_oracle_chooses_among_the_experts_and_not_among_their_rows_in_a_study():
    def alone(name, score, **axes):
        return Method(name, "expert", name, [Run(0, "", {"light": [score]}, seconds=[1.0])], axes=axes)

    experts = [alone("single:photo", 0.2), alone("single:paint", 0.4)]
    (oracle,) = best_of_n([*experts, alone("single:paint, 50 steps", 0.9, steps=50)], "light")
    assert oracle.runs[0].scores == {"light": [0.4]} and oracle.runs[0].seconds == [2.0]


@pytest.fixture
def red(tmp_path):
    (tmp_path / "red.py").write_text("def reward(images, captions):\n    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))\n")
    return str(tmp_path / "red.py")


def test_objectives_are_compared_with_as_many_steps_of_the_diffusion_loss(settings, red, tmp_path, capsys):  # noqa: F811
    run = replace(settings, methods=["single"], study=["objectives"], images_per_prompt=1, reward=red)
    evaluate(run)
    results = Results.load(Path(run.output))
    assert not results.errors
    rows = {method.axes["objective"]: method for method in results.methods if method.axes}
    assert list(rows) == list(FURTHER)
    assert {name: method.of for name, method in rows.items()} == {name: "afa" if name == "mse" else "afa, objective mse" for name in FURTHER}
    for name in FURTHER:
        (folder,) = (Path(run.output) / "trained").glob(f"objective-{name.replace('+', '-')}/seed-0")
        record = read_manifest(folder).training["settings"]
        assert record["objective"] == name and record["start"] == run.ensemble and record["batch_size"] == 1
        assert (record["reward"] is None) == (name == "mse")
    assert main(["report", run.output, "--output", str(tmp_path / "report.html"), "--markdown", str(tmp_path / "report.md")]) == 0
    said = (tmp_path / "report.md").read_text()
    assert "Objectives, further steps by each" in said
    assert said.count("as it is") == 1 and said.count("(with AFA, further by mse)") == 4


def test_the_study_of_objectives_needs_a_reward_that_is_named(settings):  # noqa: F811
    run = replace(settings, methods=["single"], study=["objectives"], images_per_prompt=1)
    evaluate(run)
    errors = json.loads((Path(run.output) / "results.json").read_text())["errors"]
    assert len(errors) == len(FURTHER) - 1 and all("name one with --reward" in error for error in errors)


def test_ablations_change_one_thing_each(settings):  # noqa: F811
    run = replace(settings, methods=["single"], study=["ablations"], images_per_prompt=1)
    evaluate(run)
    results = Results.load(Path(run.output))
    assert not results.errors
    variants = {method.axes["variant"] for method in results.methods if "variant" in method.axes}
    assert variants == {"own paths (stitch)", "no text", "no time", "no spatial map", "depth 0", "depth 2", "placement blocks", "placement out"}
    own = read_manifest(Path(run.ensemble)).training["settings"]
    for folder in (Path(run.output) / "trained").glob("*/seed-0"):
        changed = {name for name, value in read_manifest(folder).training["settings"].items() if value != own[name]}
        assert len(changed - {"output", "vae", "device", "experts"}) == 1, (folder, changed)


def test_training_data_are_those_that_the_user_names(settings, world):  # noqa: F811
    from afa.evaluation.setup import Setup

    lines = [json.loads(line) for line in (world / "data" / "metadata.jsonl").read_text().splitlines()]
    listed = world / "list.jsonl"
    listed.write_text("\n".join(json.dumps({"path": str(world / "data" / line["file_name"]), "caption": line["text"]}) for line in lines))
    copied = world / "afa-listed"
    shutil.copytree(world / "afa", copied, dirs_exist_ok=True)
    manifest = json.loads((copied / "afa.json").read_text())
    manifest["training"]["settings"]["data"] = str(listed)
    (copied / "afa.json").write_text(json.dumps(manifest))
    setup = Setup(replace(settings, ensemble=str(copied), train_data=str(listed)))
    assert setup.training_data == str(listed)
    assert setup.training(Path("out"), 1).data == str(listed)
    with pytest.raises(UserError, match="--train-data"):  # a file may not name what is read
        _ = Setup(replace(settings, ensemble=str(copied), train_data=None)).training_data
