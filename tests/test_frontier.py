"""Several values of guidance or steps: each method has its own, and curves are compared at equal distance."""

import dataclasses
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import made_results
from test_evaluate import images, settings, world  # noqa: F401 (fixtures)

from afa.cli.main import main
from afa.errors import UserError
from afa.evaluation import images as drawing
from afa.evaluation.compare import analyse
from afa.evaluation.frontier import mean_gap, reach
from afa.evaluation.plan import plan
from afa.evaluation.report.files import as_csv, as_markdown, as_text
from afa.evaluation.report.page import as_html
from afa.evaluation.results import Results
from afa.evaluation.run import evaluate
from afa.evaluation.tuning import Tuner

# --- what is drawn ---


@pytest.fixture(scope="module")
def small_world(world):  # noqa: F811
    """A comparison collects garbage after every row, which need not look at what has been imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def several(settings, small_world):  # noqa: F811
    """Two prompts; the router, so that something is trained."""
    return replace(settings, images_per_prompt=1, methods=["weighted", "noise_average", "prediction_router"], guidance=[1.5, 2.0, 3.0])


def by(rule):
    """A tuning score that is a rule of guidance, in place of a score of images."""
    return lambda tuner, sampler: float(rule(tuner.at.get("guidance", tuner.sampling.guidance)))


@pytest.fixture
def drawn(monkeypatch):
    """Every image that is drawn to be judged, as (how it was made, its noise)."""
    found, draw = [], drawing.draw

    def noted(files, *given, **more):
        found.extend((file.facts["made_by"], file.request.prompt, file.request.seed) for file in files)
        return draw(files, *given, **more)

    monkeypatch.setattr(drawing, "draw", noted)
    return found


def test_one_value_in_a_list_is_that_value_to_the_byte(settings, tmp_path):  # noqa: F811
    written = []
    for name, given in (("a", {"guidance": 2.0, "steps": 2}), ("b", {"guidance": [2.0], "steps": [2]})):
        run = replace(settings, methods=["weighted"], images_per_prompt=1, output=str(tmp_path / name), **given)
        results = evaluate(run)
        assert results.own == {} and not any(method.axes for method in results.methods)
        written.append((tmp_path / name / "settings.json").read_text())
        facts = json.loads((tmp_path / name / "results.json").read_text())
        assert "own" not in facts and facts["protocol"]["guidance"] == 2.0 and facts["protocol"]["steps"] == 2
        assert sorted(path.name for path in (tmp_path / name / "images").iterdir()) == ["afa", "single-paint", "single-photo", "weighted"]
    assert written[0] == written[1] and json.loads(written[0])["guidance"] == 2.0


def test_a_methods_own_value_is_chosen_on_captions_that_are_not_judged(several, monkeypatch):
    several, asked, judge = replace(several, methods=["weighted"]), set(), Tuner.judge

    def noted(tuner, sampler):
        def seen(requests, sampling):
            asked.update(request.prompt for request in requests)
            return sampler(requests, sampling)

        return judge(tuner, seen)

    monkeypatch.setattr(Tuner, "judge", noted)
    results = evaluate(several)
    assert asked == {"picture 0", "picture 1"} and not asked & {item.caption for item in results.items}
    for file in Path(several.output).glob("tuning/*/*.json"):
        assert "light" not in file.read_text()
    kept = json.loads(next(Path(several.output).glob("tuning/*/afa.json")).read_text())
    scores = {json.loads(key)[1]["guidance"] if key != "{}" else 2.0: value for key, value in kept.items()}
    assert scores.keys() == {1.5, 2.0, 3.0}
    assert results.own["afa"] == {"guidance": max(scores, key=scores.__getitem__)}


def check_own(results, own):
    """All methods have this value, under which our images lie."""
    assert {name: values for name, values in results.own.items() if values != {"guidance": own}} == {}
    rows = {method.name: method for method in results.methods}
    place = "" if own == 2.0 else f"/guidance-{own:g}"
    assert rows["afa"].runs[0].images == f"images/afa{place}/seed-0" and f"guidance {own:g}, chosen by 2 other images" in rows["afa"].note


@pytest.mark.parametrize(("rule", "own"), [(lambda value: -value, 1.5), (lambda value: 1, 2.0)])
def test_the_tuning_score_decides_and_equal_scores_leave_the_start(several, monkeypatch, rule, own):
    monkeypatch.setattr(Tuner, "judge", by(rule))
    check_own(evaluate(replace(several, methods=["noise_average"])), own)


def test_no_image_is_drawn_twice_and_own_images_are_the_points_of_curves(several, drawn, monkeypatch):
    """And the highest value is everyone's own where the tuning score rises with it."""
    monkeypatch.setattr(Tuner, "judge", by(lambda value: value))
    results = evaluate(several)
    check_own(results, 3.0)
    assert len(drawn) == len(set(drawn)) == len(list(Path(several.output).rglob("images/**/*.png")))
    on_curve = [name for name in results.own if any(method.of == name for method in results.methods)]
    assert on_curve == ["single:photo", "weighted", "noise_average", "prediction_router", "afa"]
    for name in on_curve:
        values = [method.axes["guidance"] for method in results.methods if method.of == name]
        assert sorted([*values, results.own[name]["guidance"]]) == [1.5, 2.0, 3.0]
    folders = [run.images for method in results.methods for run in method.runs]
    assert len(folders) == len(set(folders))


def test_values_are_added_and_taken_away_without_a_second_image(several, drawn, monkeypatch):
    monkeypatch.setattr(Tuner, "judge", by(lambda value: value))
    several = replace(several, methods=["weighted", "prediction_router"])
    first = evaluate(replace(several, guidance=2.0))
    assert len(drawn) == 2 * 5
    evaluate(several)
    assert len(drawn) == 2 * (4 * 3 + 2)  # of the expert off the curves only its own value is new
    evaluate(replace(several, guidance=[2.0, 3.0]))
    assert len(drawn) == 2 * 14
    again = evaluate(replace(several, guidance=2.0))
    assert len(drawn) == len(set(drawn)) == 2 * 14 and again.methods == first.methods
    with pytest.raises(UserError, match=r"was begun with guidance 2, which is not among --guidance 1.5 3; add it"):
        evaluate(replace(several, guidance=[1.5, 3.0]))


def test_an_interrupted_run_goes_on_to_the_same_results(several, monkeypatch, tmp_path):
    monkeypatch.setattr(Tuner, "judge", by(lambda value: value))
    small = replace(several, batch_size=1, methods=["weighted"], guidance=[1.5, 3.0])
    save, calls = drawing.ImageFile.save, []

    def interrupted(*given, **notes):
        calls.append(given)
        if len(calls) == 12:  # a curve has one of its two images
            raise KeyboardInterrupt
        save(*given, **notes)

    with monkeypatch.context() as patch:
        patch.setattr(drawing.ImageFile, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(small)
    before = images(small)
    assert any("guidance-3" not in str(path) for path in before)  # which is everyone's own; of 1.5, the first, no folder is named
    resumed = evaluate(small)
    whole = evaluate(replace(small, output=str(tmp_path / "whole")))
    assert [run.scores for method in resumed.methods for run in method.runs] == [run.scores for method in whole.methods for run in method.runs]
    assert resumed.own == whole.own


@pytest.mark.parametrize(
    ("kind", "given"), [("prediction_router", {"guidance": [1.5, 2.0, 3.0]}), ("noise_average", {"guidance": [1.5, 2.0], "steps": [1, 2]})]
)
def test_a_dry_run_counts_the_images_of_values_and_curves(several, kind, given, drawn, monkeypatch):
    """A trained kind, and one that is sampled; our own is trained in both."""
    run, captions = replace(several, methods=["weighted", "auto_mbw", kind], seeds=2, search_trials=2, **given), []
    judge = Tuner.judge
    monkeypatch.setattr(Tuner, "judge", lambda tuner, sampler: captions.append(len(tuner.captions)) or judge(tuner, sampler))
    monkeypatch.setattr("afa.evaluation.plan._times", lambda *given: {})
    facts = plan(run)
    evaluate(replace(run, methods=["weighted", "auto_mbw"], seeds=1))
    counted = [len(drawn), sum(captions)]
    rest = plan(run)
    evaluate(run)
    assert facts["images_to_judge"] + facts["images_of_curves"] == len(drawn)
    assert facts["images_to_choose_options"] + facts["images_to_search_weights"] == sum(captions)
    assert rest["images_to_judge"] + rest["images_of_curves"] == len(drawn) - counted[0]
    assert rest["images_to_choose_options"] + rest["images_to_search_weights"] == sum(captions) - counted[1]
    assert plan(run)["images"] == 0


def test_steps_have_curves_too_and_the_old_study_names_the_new_flag(several):
    results = evaluate(replace(several, methods=["weighted"], guidance=2.0, steps=[3, 1, 2], curves=["weighted"]))
    assert [method.name for method in results.methods if method.axes] == [
        f"weighted, {value} steps" for value in (1, 2, 3) if value != results.own["weighted"]["steps"]
    ]
    with pytest.raises(UserError, match="--study steps is --steps 10 20 30 50 now"):
        replace(several, study=["steps"])
    with pytest.raises(UserError, match="did you mean 'experts'"):
        replace(several, study=["expert"])
    with pytest.raises(UserError, match="--curves are over several values"):
        replace(several, guidance=2.0, curves=["afa"])
    with pytest.raises(UserError, match="--curves: there is no compared method 'slerp'"):
        evaluate(replace(several, curves=["slerp"]))


def test_a_method_that_needs_guidance_is_not_tried_without(several):
    results = evaluate(replace(several, methods=["magicfusion"], guidance=[1.0, 2.0, 3.0], curves=["magicfusion"]))
    assert not results.errors
    values = [method.axes["guidance"] for method in results.methods if method.of == "magicfusion"]
    assert sorted([*values, results.own["magicfusion"]["guidance"]]) == [2.0, 3.0]


def test_without_tuning_captions_every_method_keeps_the_start(several):
    results = evaluate(replace(several, methods=["weighted"], tuning=0))
    assert set(map(str, results.own.values())) == {"{'guidance': 2.0}"}
    assert "there is nothing to choose by" in results.methods[0].note


# --- curves ---

LOW, HIGH = np.asarray([38.0, 43.0, 57.0]), np.asarray([0.867, 0.923, 0.880])


def test_what_a_curve_reaches_are_the_corners_of_its_staircase():
    distances, qualities = reach(np.asarray([57.0, 38.0, 43.0, 43.0]), np.asarray([0.88, 0.867, 0.923, 0.9]))
    assert distances.tolist() == [38.0, 43.0] and qualities.tolist() == [0.867, 0.923]


def test_the_gap_of_a_curve_to_itself_is_zero_and_to_a_shifted_one_the_shift():
    assert mean_gap((LOW, HIGH), (LOW, HIGH), 38, 57) == 0
    assert mean_gap((LOW, HIGH + 0.02), (LOW, HIGH), 38, 57) == pytest.approx(0.02)
    assert mean_gap((LOW, HIGH), (LOW, HIGH), 40, 40) == 0
    order = [2, 0, 1]
    assert mean_gap((LOW[order], HIGH[order]), (LOW, HIGH), 38, 57) == 0


def test_the_gap_is_the_area_between_by_hand():
    one, other = (np.asarray([0.0, 2.0]), np.asarray([0.0, 1.0])), (np.asarray([0.0, 4.0]), np.asarray([0.0, 1.0]))
    # 1/2 and 1/4 a unit up to 2, then 1 against the rest of the other's line: (1/2 + 1/2) / 4
    assert mean_gap(one, other, 0, 4) == pytest.approx(0.25)
    assert mean_gap(other, one, 0, 4) == pytest.approx(-0.25)


CURVES = {"afa": 0.0, "single:patterns": 0.0, "weighted": 0.0, "prediction_router": 0.0}


def with_curves(shift=None, apart=None, prompts=20):
    """Results in which methods have curves over guidance 1.5, 3 (their own) and 5.

    shift: by method, instead of its own scores those of our method minus this
    apart: by method, added to its distances
    """
    made = made_results(prompts=prompts, copies=1, runs=1, studies=False, resamples=200, few=True)
    methods, own, ours = [], {}, next(method for method in made.methods if method.name == "afa")
    for method in made.methods:
        if method.name not in CURVES:
            methods.append(method)
            continue
        run, own[method.name] = method.runs[0], {"guidance": 3.0}
        if shift is not None and method.name in shift:
            lower = [value - shift[method.name] for value in ours.runs[0].scores["attributes"]]
            run = dataclasses.replace(run, scores={**run.scores, "attributes": lower}, sets=ours.runs[0].sets)
        run = moved(run, 0, (apart or {}).get(method.name, 0))
        methods.append(dataclasses.replace(method, runs=[run]))
        for guidance, better, further in ((1.5, -0.05, -20.0), (5.0, 0.03, 30.0)):
            methods.append(
                dataclasses.replace(
                    method, name=f"{method.name}, guidance {guidance:g}", title=f"{method.title}, guidance {guidance:g}",
                    runs=[moved(run, better, further)], axes={"guidance": guidance}, of=method.name,
                )
            )
    return dataclasses.replace(made, methods=methods, own=own, protocol={**made.protocol, "guidance": [1.5, 3.0, 5.0]})


def moved(run, better, further):
    scores = {name: [value + better for value in values] for name, values in run.scores.items()}
    sets = {
        name: dataclasses.replace(one, value=one.value + further, replicates=[value + further for value in one.replicates])
        for name, one in run.sets.items()
    }
    return dataclasses.replace(run, scores=scores, sets=sets)


def test_a_copy_of_our_curve_has_no_gap_and_a_lower_one_has_its_distance_in_every_resample():
    (found,) = analyse([with_curves(shift={"weighted": 0.0, "prediction_router": 0.1})])[0].frontiers
    gaps = {gap.other: gap.comparison for gap in found.gaps}
    assert gaps.keys() == CURVES.keys() - {"afa"}
    copy, lower = gaps["weighted"].difference, gaps["prediction_router"].difference
    assert (copy.value, copy.low, copy.high) == (0, 0, 0) and gaps["weighted"].verdict == "undecided"
    assert [lower.value, lower.low, lower.high] == pytest.approx([0.1] * 3) and gaps["prediction_router"].verdict == "better"
    assert gaps["single:patterns"].difference.high > gaps["single:patterns"].difference.low


def test_curves_that_do_not_overlap_are_said_and_not_compared_if_each_is_ahead_in_something():
    one = analyse([with_curves(apart={"weighted": -1000.0})])[0]
    gap = next(gap for gap in one.frontiers[0].gaps if gap.other == "weighted")
    assert gap.comparison is None and gap.nearer == "weighted"
    assert "weighted merge (the curves do not overlap: weighted merge is nearer with all values, frechet" in " ".join(as_text(one).split())
    assert "no overlap: weighted merge is nearer" in as_markdown([one], ["scenes"])


def test_a_curve_that_is_nearer_and_better_everywhere_is_better_though_nothing_overlaps():
    made = [with_curves(apart={"weighted": 1000.0}), with_curves(shift={"weighted": -0.1}, apart={"weighted": -1000.0})]
    gap, backwards = (next(gap for gap in analyse([one])[0].frontiers[0].gaps if gap.other == "weighted") for one in made)
    assert gap.nearer == "afa" and gap.comparison.verdict == "better"
    assert backwards.nearer == "weighted" and backwards.comparison.verdict == "worse" and backwards.comparison.difference.value < 0


def test_results_without_several_values_or_without_a_distance_have_no_curves():
    assert analyse([made_results(prompts=8, copies=1, runs=1, resamples=50, few=True)])[0].frontiers == []
    made = with_curves(prompts=8)
    images_only = dataclasses.replace(made, metrics={"attributes": made.metrics["attributes"]})
    assert analyse([images_only])[0].frontiers == []


def test_every_form_of_the_report_shows_the_curves(tmp_path):
    made = with_curves()
    made.save(tmp_path)
    assert Results.load(tmp_path) == made
    one = analyse([made])[0]
    page, text = as_html([one], ["scenes"]), as_text(one)
    plot = page[page.index("<polyline") :].partition("</svg>")[0]
    assert plot.count("<polyline") == len(CURVES) and ">AFA, 3</text>" in plot and ">1.5</text>" in plot
    for said in (page, " ".join(text.split()), as_markdown([one], ["scenes"])):
        assert "by attributes at equal frechet, the curve of AFA is" in said and "at its own guidance" in said
    lines = as_csv([one], ["scenes"]).splitlines()
    compared = [line for line in lines if "attributes at equal frechet" in line]
    assert len(compared) == 3 and all("curve over guidance" in line for line in compared)
    assert any("guidance=1.5" in line for line in lines) and any("guidance=3" in line for line in lines)


def test_the_command_explains_several_values(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "several values: each method is judged at its own" in said and "--curves" in said
