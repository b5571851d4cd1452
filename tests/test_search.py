"""The search for block weights: it finds what there is to find, tries nothing twice, and loses nothing."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from merging_models import PIPELINES
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import FLUX_SMALL, SD3_SMALL

from afa.cli.main import main
from afa.errors import UserError
from afa.experts.load import load_expert
from afa.merging.optimisers import (  # fmt: skip
    LINES,
    MEANS,
    Journal,
    Space,
    bayesian_search,
    best_point,
    coordinate_search,
    groups,
    key,
    moved,
)
from afa.merging.search import BEST, POINTS, as_toml, evaluations, search
from afa.merging.settings import SearchSettings

SPACE = Space(("IN00", "IN01", "M00", "OUT00", "OUT01"), 2)
GOAL = {"base": 0.3, "M00": 0.7, "IN00": 0.0, "IN01": 1.0, "OUT00": 0.5, "OUT01": 0.2}


def hill(weights):
    """Highest at GOAL, the same for two images."""
    value = -sum((row[1] - GOAL[place]) ** 2 for place, row in weights.items())
    return [value - 0.1, value + 0.1]


class Counting:
    def __init__(self, objective, stop_after=None):
        self.objective, self.asked, self.stop_after = objective, [], stop_after

    def __call__(self, weights):
        if self.stop_after is not None and len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(key(weights))
        return self.objective(weights)


def shares(weights):
    return {place: round(row[1], 6) for place, row in weights.items()}


def test_the_coordinate_search_finds_the_best_point_of_its_grid():
    assert shares(coordinate_search(SPACE, Journal(None, hill))) == GOAL


def test_base_and_the_middle_come_first():
    assert groups(SPACE, 1) == [("base",), ("M00",), ("IN00",), ("IN01",), ("OUT00",), ("OUT01",)]
    assert groups(SPACE, 2) == [("base",), ("M00",), ("IN00", "IN01"), ("OUT00", "OUT01")]


def test_a_transformers_stages_are_searched_in_order_and_only_blocks_of_one_kind_together():
    space = Space(("D00", "D01", "D02", "S00", "S01", "OUT"), 2)
    assert groups(space, 1) == [("base",), ("D00",), ("D01",), ("D02",), ("S00",), ("S01",), ("OUT",)]
    assert groups(space, 2) == [("base",), ("D00", "D01"), ("D02",), ("S00", "S01"), ("OUT",)]


@pytest.mark.parametrize(("line", "most"), [("linear", 11), ("binary", 6), ("binary_mid", 9)])
def test_a_line_search_asks_no_more_than_it_says(line, most):
    asked = []
    found = LINES[line](lambda share: asked.append(share) or -((share - 0.3) ** 2))
    assert len(set(asked)) <= most
    assert abs(found - 0.3) <= 0.1


def test_a_second_pass_finds_what_the_first_could_not():
    """Two stages that only help together with a third: one pass over places in order cannot see it."""

    def ridge(weights):
        first, last = weights["IN00"][1], weights["OUT01"][1]
        return [-((first - last) ** 2) + 0.5 * last]

    once, twice = (coordinate_search(SPACE, Journal(None, ridge), passes=passes) for passes in (1, 2))
    assert ridge(twice)[0] > ridge(once)[0]


def test_three_experts_share_what_one_leaves():
    row = moved({"base": (0.5, 0.25, 0.25)}, ["base"], 2, 0.5)["base"]
    assert row == pytest.approx((1 / 3, 1 / 6, 0.5))
    assert moved({"base": (0.0, 0.0, 1.0)}, ["base"], 2, 0.0)["base"] == (0.5, 0.5, 0.0)


def test_the_coordinate_search_of_three_experts_finds_the_best_of_each_stage():
    space = Space(("IN00", "M00", "OUT00"), 3)
    wanted = {"base": 2, "IN00": 0, "M00": 1, "OUT00": 2}
    found = coordinate_search(space, Journal(None, lambda weights: [sum(weights[place][expert] for place, expert in wanted.items())]))
    assert {place: max(range(3), key=row.__getitem__) for place, row in found.items()} == wanted


def test_the_optimiser_improves_on_where_it_starts():
    journal = Journal(None, hill)
    best = bayesian_search(SPACE, journal, trials=60)
    start = max(hill(SPACE.middle()), hill(SPACE.corner(0)), hill(SPACE.corner(1)))
    assert sum(hill(best)) > sum(start)
    assert len(journal.points) <= 60


@pytest.mark.parametrize("experts", [2, 3])
def test_the_optimiser_proposes_convex_weights_only(experts):
    space = Space(("IN00", "M00", "OUT00"), experts)
    journal = Journal(None, lambda weights: [weights["M00"][0]])
    bayesian_search(space, journal, trials=20)
    for weights, _ in journal.points:
        assert set(weights) == set(space.places)
        assert all(min(row) >= 0 and sum(row) == pytest.approx(1) for row in weights.values())


@pytest.mark.parametrize("how", ["coordinate", "bayesian"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(how, tmp_path):
    def run(journal):
        return coordinate_search(SPACE, journal) if how == "coordinate" else bayesian_search(SPACE, journal, trials=25)

    whole = Journal(tmp_path / "whole.jsonl", hill)
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(Journal(tmp_path / "part.jsonl", Counting(hill, stop_after=12)))
    rest = Counting(hill)
    again = Journal(tmp_path / "part.jsonl", rest)
    assert len(again.points) == 12
    assert run(again) == expected
    assert [key(weights) for weights, _ in again.points] == [key(weights) for weights, _ in whole.points]
    assert len(rest.asked) == len(whole.points) - 12


def test_no_point_is_evaluated_twice():
    counting = Counting(hill)
    coordinate_search(SPACE, Journal(None, counting), passes=2)
    assert len(counting.asked) == len(set(counting.asked))


def test_a_torn_line_is_evaluated_again(tmp_path):
    file = tmp_path / POINTS
    journal = Journal(file, hill)
    journal(SPACE.middle())
    journal(SPACE.corner(0))
    file.write_bytes(file.read_bytes()[:-20])
    again = Journal(file, Counting(hill))
    assert len(again.points) == 1
    again(SPACE.corner(1))
    assert len(Journal(file, hill).points) == 2


def test_the_best_survives_an_objective_that_fails(tmp_path):
    def failing(weights):
        if weights["IN01"][1] > 0.35:
            raise RuntimeError("out of memory")
        return hill(weights)

    with pytest.raises(RuntimeError):
        coordinate_search(SPACE, Journal(tmp_path / POINTS, failing))
    kept = Journal(tmp_path / POINTS, hill)
    assert shares(best_point(kept))["M00"] == 0.7


def test_the_stricter_the_mean_the_more_a_bad_image_counts():
    even, uneven = [0.5, 0.5], [1.5, -0.5]
    assert MEANS["arithmetic"](even) == MEANS["arithmetic"](uneven)
    assert MEANS["geometric"](uneven) < 0.5
    assert MEANS["harmonic"](uneven) < MEANS["geometric"](uneven)
    assert MEANS["geometric"]([0.3]) == pytest.approx(0.3)
    assert MEANS["harmonic"]([-2.2, -2.2]) == pytest.approx(-2.2)


def test_weights_are_written_as_afa_merge_reads_them(tmp_path):
    from afa.merging.block_weights import stage_weights

    weights = moved(SPACE.middle(), ["M00"], 1, 0.25)
    (tmp_path / BEST).write_text(as_toml(weights, ["photo", "paint"]))
    assert tomllib.loads((tmp_path / BEST).read_text())["M00"] == [0.75, 0.25]
    assert stage_weights(str(tmp_path / BEST), SPACE.stages, 2) == weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    (folder / "scorer.py").write_text("def score(images, captions):\n    return {'light': images.mean((1, 2, 3)) / 255}\n")
    return folder


@pytest.fixture
def settings(world, tmp_path):
    return SearchSettings(
        experts=[str(world / "photo"), str(world / "paint")], output=str(tmp_path / "out"), prompt=["a cat"], images=2, steps=1, width=32, height=32,
        scorer=str(world / "scorer.py"), trials=5, device="cpu",
    )  # fmt: skip


def test_a_search_leaves_weights_that_merge(settings, tmp_path):
    record = search(settings)
    assert record["merges"] == 5
    assert record["score"] >= record["first_score"]
    merge = ["merge", "--method", "mbw", "--weights", str(Path(settings.output) / BEST), "--experts", *settings.experts]
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 0


@pytest.fixture(scope="module", params=["sd3", "flux"])
def transformers(request, tmp_path_factory):
    """The settings of a search over two transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("photo", "paint")):
        PIPELINES[request.param](seed, text_seed=seed, **(SD3_SMALL if request.param == "sd3" else FLUX_SMALL)).save_pretrained(folder / name)
    (folder / "scorer.py").write_text("def score(images, captions):\n    return {'light': images.mean((1, 2, 3)) / 255}\n")
    return SearchSettings(
        experts=[str(folder / "photo"), str(folder / "paint")], output=str(folder / "out"), prompt=["a cat"], images=1, steps=1, width=32, height=32,
        scorer=str(folder / "scorer.py"), trials=4, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("how", ["bayesian", "coordinate"])
def test_transformers_are_searched_by_their_own_stages(how, transformers, tmp_path):
    settings = replace(transformers, search=how, line="binary", grouping=2, output=str(tmp_path / "out"))
    record = search(settings)
    assert record["highest_score"] >= record["score"] >= record["first_score"]
    assert len({tuple(scores) for _, scores in Journal(Path(settings.output) / POINTS, hill).points}) > 1
    stages = {"sd3": "J00 J01 OUT", "flux": "D00 S00 S01 OUT"}[load_expert(settings.experts[0]).family]
    assert list(record["weights"]) == ["base", *stages.split()]
    merge = ["merge", "--method", "mbw", "--weights", str(Path(settings.output) / BEST), "--experts", *settings.experts]
    assert main([*merge, "--output", str(tmp_path / "merged"), "--dry-run"]) == 0


def test_a_finished_search_judges_nothing_again_and_may_be_extended(settings, monkeypatch):
    first = search(settings)
    monkeypatch.setattr("afa.merging.search.sample", lambda *given: pytest.fail("drawn again"))
    assert search(settings) == first
    monkeypatch.undo()
    assert search(replace(settings, trials=7))["merges"] == 7


def test_a_search_begun_otherwise_is_refused(settings):
    search(settings)
    with pytest.raises(UserError, match=r"was begun with --images 2 \(now 3\)"):
        search(replace(settings, images=3))


def test_equal_experts_score_the_same_whatever_the_weights(settings, world):
    search(replace(settings, experts=[f"a={world / 'photo'}", f"b={world / 'photo'}"]))
    lines = (Path(settings.output) / POINTS).read_text().splitlines()
    assert len({tuple(json.loads(line)["scores"]) for line in lines}) == 1


def test_the_number_of_merges_is_known_beforehand(settings):
    assert evaluations(settings, SPACE) == 5
    assert evaluations(replace(settings, search="coordinate", line="binary", passes=2), SPACE) == 1 + 2 * 6 * 6


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--experts", "one"], "--experts has 1 expert; a merge needs at least two"),
        (["--experts", "a", "b", "--prompts", "p.txt"], "give either --prompt TEXT... or --prompts FILE"),
        (["--experts", "a", "b", "--scorer", "nowhere.py"], "--scorer nowhere.py is no Python file"),
        (["--experts", "a", "b", "--metric", "frechet"], "is one value for a set of images; choose one that judges each image"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, capsys, tmp_path):
    assert main(["search", *flags, "--prompt", "a cat", "--output", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mean_that_is_not_there_is_refused(settings):
    with pytest.raises(UserError, match="--means: there is no value 'median'"):
        replace(settings, means=["median"])
