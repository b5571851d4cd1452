"""A user's own scorer: a Python file that is run, and what it returns, checked."""

import numpy as np
import pytest
from metric_models import images, pictures

from afa.errors import UserError
from afa.metrics.base import SetMetric
from afa.metrics.user import load_scorer

SCORER = """
import numpy as np
def score(images, captions):
    return {"light": images.mean((1, 2, 3)), "words": [len(caption.split()) for caption in captions]}
"""


def scorer(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return load_scorer(tmp_path / name)


def test_a_users_scores_are_of_each_image_with_its_caption(tmp_path):
    shown = pictures(3)
    (metric,) = scorer(tmp_path, SCORER)
    found = metric.score(shown)
    assert metric.names == ("light", "words")
    np.testing.assert_allclose(found["light"], [each.image.mean() for each in shown])
    assert found["words"].tolist() == [3, 3, 3] and found["words"].dtype == np.float64


def test_a_users_features_make_a_frechet_distance(tmp_path):
    _, metric = scorer(tmp_path, SCORER + "def features(images):\n    return images.reshape(len(images), -1)[:, :4]\n")
    features = metric.features(images(9))
    assert isinstance(metric, SetMetric) and (metric.name, metric.higher_is_better) == ("frechet", False)
    assert features.shape == (9, 4)
    assert metric.value(features, metric.prepare(features)) == pytest.approx(0, abs=1e-6)


def test_a_scorer_may_import_its_neighbours_and_define_dataclasses(tmp_path):
    (tmp_path / "neighbour_of_scorer.py").write_text("FACTOR = 3")
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_scorer import FACTOR\n"
    body = "@dataclass\nclass Rule:\n    factor: int = FACTOR\ndef score(images, captions):\n    return {'a': [Rule().factor] * len(images)}\n"
    (metric,) = scorer(tmp_path, head + body)
    assert metric.score(pictures(2))["a"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("[1, 2]", "returned list, expected a dict of arrays with at least one"),
        ("{}", "returned dict, expected a dict of arrays with at least one"),
        ("{'a': [1.0]}", r"'a' has shape (1,) for 3 images, expected (3,)"),
        ("{'a': [1, float('nan'), 2]}", "'a' is not finite for image 1"),
        ("{'a': ['x', 'y', 'z']}", "'a' is no array of numbers"),
        ("{'a': images}", "'a' has shape (3, 24, 24, 3) for 3 images"),
    ],
)
def test_what_a_scorer_returns_is_checked(tmp_path, body, sentence):
    (metric,) = scorer(tmp_path, f"def score(images, captions):\n    return {body}\n")
    with pytest.raises(UserError) as raised:
        metric.score(pictures(3))
    assert sentence in str(raised.value) and str(tmp_path / "mine.py") in str(raised.value)


def test_a_scorer_whose_names_change_is_refused(tmp_path):
    (metric,) = scorer(tmp_path, "def score(images, captions):\n    return {f'of {len(images)}': [0.0] * len(images)}\n")
    metric.score(pictures(2))
    with pytest.raises(UserError, match="returned of 3 where it returned of 2 before"):
        metric.score(pictures(3))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", "has no function score(images, captions)"),
        ("score = 3", "has no function score(images, captions)"),
        ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise SystemExit(3)", "cannot be run: SystemExit: 3"),
        ("def score(", "cannot be run: SyntaxError"),
    ],
)
def test_a_file_that_cannot_judge_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError) as raised:
        scorer(tmp_path, text)
    assert sentence in str(raised.value)


def test_something_else_than_a_python_file_is_no_scorer(tmp_path):
    for place in (tmp_path, tmp_path / "missing.py", tmp_path / "scorer.txt"):
        with pytest.raises(UserError, match="is no Python file"):
            load_scorer(place)


def test_a_scorer_gets_images_of_one_size(tmp_path):
    (metric,) = scorer(tmp_path, SCORER)
    with pytest.raises(UserError, match="is given images of one size, and these have 2"):
        metric.score([*pictures(1), *pictures(1, side=30)])


@pytest.mark.parametrize("body", ["images[0]", "images.reshape(len(images), -1) / 0.0", "'features'"])
def test_what_features_returns_is_checked(tmp_path, body):
    _, metric = scorer(tmp_path, SCORER + f"def features(images):\n    return {body}\n")
    with pytest.raises(UserError, match=r"features\(\) of .* returned"), np.errstate(all="ignore"):
        metric.features(images(3))


def test_a_scorer_is_known_by_its_content(tmp_path):
    (first,) = scorer(tmp_path, SCORER)
    known = first.identity
    (second,) = scorer(tmp_path, SCORER + "# changed\n")
    assert known != second.identity
