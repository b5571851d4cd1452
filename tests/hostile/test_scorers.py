"""Laws of a user's own scorers and rewards: tried before anything is drawn, named by source where names collide, never a traceback."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import afa
from tiny import ONE_LEVEL, sd_pipeline

from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.judge import Judge
from afa.evaluation.results import Results
from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.metrics.base import ImageMetric, Picture
from afa.metrics.user import load_scorer, try_scorer
from afa.training.reward_objectives import make_reward

GOOD = "def score(images, captions):\n    return {'light': images.mean((1, 2, 3)) / 255}\n"
# What a scorer may do wrong, and a word of what is said of it.
BROKEN = {
    "raises": ("def score(images, captions):\n    x = 1\n    return {}['nothing']\n", "KeyError: 'nothing' (broken.py, line 3)"),
    "exits": ("import sys\ndef score(images, captions):\n    sys.exit(3)\n", "SystemExit: 3 (broken.py, line 3)"),
    "takes one argument": ("def score(images):\n    return {'a': [1.0] * len(images)}\n", "TypeError"),
    "wants floats": ("import torch\ndef score(images, captions):\n    return torch.relu(images)\n", "line 3"),
    "many lines": ("def score(images, captions):\n    raise ValueError('one\\ntwo\\nthree')\n", "ValueError: one two three"),
    "strings": ("def score(images, captions):\n    return {'a': ['0.5'] * len(images)}\n", "'a' is no array of numbers but list"),
    "nan": ("def score(images, captions):\n    return {'a': [float('nan')] * len(images)}\n", "'a' is not finite"),
    "None": ("def score(images, captions):\n    return {'a': [None] * len(images)}\n", "'a' is no array of numbers"),
    "complex": ("def score(images, captions):\n    return {'a': [1j] * len(images)}\n", "'a' is no array of numbers"),
    "huge": ("def score(images, captions):\n    return {'a': [10 ** 400] * len(images)}\n", "'a' is no array of numbers"),
    "one number": ("def score(images, captions):\n    return {'a': 0.5}\n", "has shape () for 2 images"),
    "one too many": ("def score(images, captions):\n    return {'a': [1.0] * 3}\n", "has shape (3,) for 2 images"),
    "a list": ("def score(images, captions):\n    return [1.0, 2.0]\n", "returned list, expected a dict"),
    "nothing": ("def score(images, captions):\n    pass\n", "returned NoneType, expected a dict"),
    "an empty dict": ("def score(images, captions):\n    return {}\n", "returned dict, expected a dict of arrays with at least one"),
    "a number as name": ("def score(images, captions):\n    return {3: [1.0, 1.0]}\n", "a score named 3"),
    "a newline in a name": ("def score(images, captions):\n    return {'a\\nb': [1.0, 1.0]}\n", r"a score named 'a\nb'"),
    "bad features": (f"{GOOD}def features(images):\n    return [1.0, 2.0]\n", "features() of"),
    "features raise": (f"{GOOD}def features(images):\n    raise OSError('gone')\n", "OSError: gone (broken.py, line 4)"),
}


def test_reading_a_file_of_the_user_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "scorer.py").write_text(f"import beside\n{GOOD}")
    (tmp_path / "beside.py").write_text("x = 1\n")
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        load_scorer(tmp_path / "scorer.py")
        assert sys.dont_write_bytecode is False
    finally:
        sys.dont_write_bytecode = before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside.py", "scorer.py"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny experts, their untrained ensemble, prompts."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], hidden=8, heads=2, depth=1).save(folder / "ensemble")
    (folder / "prompts.txt").write_text("a cat\na dog\na cat\n")
    (folder / "good.py").write_text(GOOD)
    return folder


def settings(world: Path, output: Path, scorer: Path, **changes: Any) -> EvaluateSettings:
    small = {"steps": 1, "width": 32, "height": 32, "tuning": 0, "device": "cpu", "methods": ["single"]}
    places = {"ensemble": str(world / "ensemble"), "output": str(output), "protocol": str(world / "prompts.txt"), "scorer": str(scorer)}
    return EvaluateSettings(**{**places, **small, **changes})


def flags(given: EvaluateSettings) -> list[str]:
    """As a command line, from the fields that differ from their defaults."""
    found = ["evaluate"]
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            values = value if isinstance(value, list) else [value]
            found += [f"--{field.name.replace('_', '-')}", *(str(one) for one in values)] if value != [] else []
    return found


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_scorer_is_one_sentence_when_it_is_tried(kind, tmp_path):
    code, said = BROKEN[kind]
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError) as raised:
        try_scorer(load_scorer(tmp_path / "broken.py"), 16, 24)
    assert said in str(raised.value) and "broken.py" in str(raised.value) and "\n" not in str(raised.value)


def test_a_scorer_is_tried_on_two_images_of_the_size_to_come_and_two_captions(tmp_path):
    (tmp_path / "seen.py").write_text(
        "seen = []\ndef score(images, captions):\n    seen.append((images.shape, str(images.dtype), len(set(captions)), images.std() > 50))\n"
        "    return {'a': [1.0] * len(images)}\n"
    )
    (metric,) = load_scorer(tmp_path / "seen.py")
    try_scorer([metric], 16, 24)
    assert metric.file.module.seen == [((2, 16, 24, 3), "uint8", 2, True)] and metric.names == ("a",)


def test_tensors_with_gradients_are_numbers(tmp_path):
    body = "import torch\ndef score(images, captions):\n    return {'a': torch.ones(len(images), dtype=torch.bfloat16, requires_grad=True)}\n"
    (tmp_path / "tensors.py").write_text(body)
    try_scorer(load_scorer(tmp_path / "tensors.py"), 8, 8)


@pytest.mark.parametrize("kind", ["raises", "exits", "bad features"])
def test_evaluate_ends_with_a_scorers_own_error_before_anything_is_drawn(kind, world, tmp_path):
    code, said = BROKEN[kind]
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "data").mkdir()
    given = settings(world, tmp_path / "out", tmp_path / "broken.py")
    if kind == "bad features":  # asked for only where there are real images
        pictures(tmp_path / "data")
        given = dataclasses.replace(given, protocol=str(tmp_path / "data"))
    run = afa(*flags(given))
    assert run.code == 2 and said in run.err and "Traceback" not in run.err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("kind", ["raises", "exits"])
def test_search_ends_with_a_scorers_own_error_before_anything_is_drawn(kind, world, tmp_path):
    code, said = BROKEN[kind]
    (tmp_path / "broken.py").write_text(code)
    experts = [world / "photo", world / "paint"]
    small = ["--prompt", "a cat", "--images", 1, "--steps", 1, "--trials", 3, "--width", 32, "--height", 32, "--device", "cpu"]
    run = afa("search", "--experts", *experts, "--scorer", tmp_path / "broken.py", "--output", tmp_path / "out", *small)
    assert run.code == 2 and said in run.err and "Traceback" not in run.err
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_a_scorer_that_fails_in_the_middle_of_a_search_is_one_sentence(world, tmp_path):
    body = "calls = []\ndef score(images, captions):\n    calls.append(1)\n    return {'a': [1 / (3 - len(calls))] * len(images)}\n"
    (tmp_path / "later.py").write_text(body)
    small = ["--prompt", "a cat", "--images", 1, "--steps", 1, "--trials", 3, "--width", 32, "--height", 32, "--device", "cpu"]
    run = afa("search", "--experts", world / "photo", world / "paint", "--scorer", tmp_path / "later.py", "--output", tmp_path / "out", *small)
    assert run.code == 2 and "ZeroDivisionError: division by zero (later.py, line 4)" in run.err and "Traceback" not in run.err


def pictures(folder: Path) -> None:
    """Captioned images for a protocol with real ones."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for place in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    lines = [json.dumps({"file_name": f"{place}.png", "text": f"picture {place}"}) for place in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


class Bright(ImageMetric):
    """A built-in metric as far as a judge can see."""

    names = ("light", "colours")
    source = "ours"
    identity = {"ours": 1}  # noqa: RUF012

    def score(self, pictures: Any) -> dict[str, Any]:
        return {name: np.full(len(pictures), 7.0) for name in self.names}


def judge_of(tmp_path: Path, code: str, *metrics: Any) -> Judge:
    (tmp_path / "mine.py").write_text(code)
    own = load_scorer(tmp_path / "mine.py")
    try_scorer(own, 8, 8)
    return Judge([*own, *metrics], tmp_path, 100)


def test_scores_are_named_by_their_file_where_names_collide_and_only_there(tmp_path):
    code = "def score(images, captions):\n    n = len(images)\n    return {'light': [1.0] * n, 'own': [2.0] * n, 'colours': [3.0] * n}\n"
    judge = judge_of(tmp_path, code, Bright())
    assert list(judge.notes()) == ["mine:light", "own", "mine:colours", "light", "colours"] and judge.primary == "mine:light"
    assert list(judge_of(tmp_path, code).notes()) == ["light", "own", "colours"]
    images = [Picture(np.zeros((8, 8, 3), np.uint8), "a", 0)]
    labels = [{judge.labels(metric)[name]: values[0] for name, values in metric.score(images).items()} for metric in judge.metrics]
    assert labels == [{"mine:light": 1, "own": 2, "mine:colours": 3}, {"light": 7, "colours": 7}]


def test_a_score_named_frechet_a_distance_of_the_same_file_and_a_built_in_one_are_three(tmp_path):
    from afa.metrics.user import UserFrechet

    class Frechet(UserFrechet):
        pass

    code = "def score(images, captions):\n    return {'frechet': [1.0] * len(images)}\n"
    code += "def features(images):\n    return images.reshape(len(images), -1)[:, :2]\n"
    judge = judge_of(tmp_path, code)
    assert len(judge.notes()) == 2 and {note.kind for note in judge.notes().values()} == {"image", "set"}
    from afa.demo.metric import frechet
    from afa.metrics.registry import Resources

    three = judge_of(tmp_path, code, frechet(Resources(None, torch.device("cpu"))))
    assert len(three.notes()) == 3 and "frechet" in three.notes()


def test_results_keep_every_score_under_its_own_name(world, tmp_path):
    """From end to end, a prompt that stands twice among three."""
    (tmp_path / "mine.py").write_text("def score(images, captions):\n    return {'light': [0.25] * len(images), 'words': [5.0] * len(images)}\n")
    found = evaluate(settings(world, tmp_path / "out", tmp_path / "mine.py"))
    assert found is not None and set(found.metrics) == {"light", "words"} and not found.errors
    kept = Results.load(tmp_path / "out")
    assert all(run.scores == {"light": [0.25] * 3, "words": [5.0] * 3} for method in kept.methods for run in method.runs)


def test_a_scorer_that_fails_later_costs_only_itself_and_the_last_sentence_is_true(world, tmp_path):
    """One image set cannot be scored: the others are, exit 0, and what is missing is named; nothing scored at all: exit 2."""
    body = "calls = []\ndef score(images, captions):\n    calls.append(1)\n    return {'a': [float('nan') if len(calls) FAILS else 1.0] * len(images)}\n"
    (tmp_path / "once.py").write_text(body.replace("FAILS", "== 2"))
    run = afa(*flags(settings(world, tmp_path / "once", tmp_path / "once.py")))
    out = " ".join(run.out.split())  # lines are wrapped
    assert run.code == 0 and "'a' is not finite" in out and "without what could not be computed (see above, 1)" in out
    (tmp_path / "always.py").write_text(body.replace("FAILS", "> 1"))
    run = afa(*flags(settings(world, tmp_path / "always", tmp_path / "always.py")))
    last = run.err.strip().splitlines()[-1]
    assert run.code == 2 and "nothing could be scored" in last and "'a' is not finite" in last and "results.json in" not in run.out


def test_a_score_that_cannot_choose_options_costs_the_choice_and_not_the_row(world, tmp_path):
    body = "def score(images, captions):\n    if len(images) == 2 and 'noise' not in captions[0]:\n        raise ValueError('no')\n"
    body += "    return {'a': [1.0] * len(images)}\n"
    (tmp_path / "choosy.py").write_text(body)
    pictures(tmp_path)
    given = settings(world, tmp_path / "out", tmp_path / "choosy.py", methods=["weighted"], tuning=2, train_data=str(tmp_path))
    found = evaluate(given)
    assert found is not None and "weighted" in {method.name for method in found.methods if method.runs[0].scores}
    assert any("its defaults are taken" in error for error in found.errors)


def test_scores_change_when_a_file_that_the_scorer_imports_does(tmp_path):
    (tmp_path / "helper_of_scorer.py").write_text("FACTOR = 1\n")
    body = "import helper_of_scorer\ndef score(images, captions):\n    return {'a': [helper_of_scorer.FACTOR] * len(images)}\n"
    (tmp_path / "main_scorer.py").write_text(body)
    (metric,) = load_scorer(tmp_path / "main_scorer.py")
    before = metric.identity
    (tmp_path / "helper_of_scorer.py").write_text("FACTOR = 2\n")
    assert metric.identity != before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def reward(images, captions):\n    return images.mean((1, 2, 3))[captions]\n", "(mine.py, line 2)"),
        ("def reward(images, captions):\n    raise SystemExit('bye')\n", "SystemExit: bye (mine.py, line 2)"),
        ("def reward(images):\n    return images.mean((1, 2, 3))\n", "TypeError"),
    ],
)
def test_a_reward_that_fails_is_one_sentence(code, said, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError) as raised:
        make_reward(str(tmp_path / "mine.py"), torch.device("cpu"))(torch.zeros(2, 3, 8, 8, requires_grad=True), ["a", "b"])
    assert said in str(raised.value) and "--reward" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("code", ["def score(:", "import nothing_of_that_name", "1 / 0"])
def test_a_file_that_cannot_be_run_is_one_sentence_with_its_line(code, tmp_path):
    (tmp_path / "broken.py").write_text(f"\n{code}\n")
    with pytest.raises(UserError, match=r"cannot be run: .*line 2") as raised:
        load_scorer(tmp_path / "broken.py")
    assert "\n" not in str(raised.value)
