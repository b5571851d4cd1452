"""Laws of claims: what may be said of few prompts, of repeats, and of training seeds that were lost."""

import csv
import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest

from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.report.content import main_table
from afa.evaluation.report.files import as_csv, as_text
from afa.evaluation.report.headline import headlines, terms
from afa.evaluation.report.page import as_html
from afa.evaluation.results import Item, Method, MetricNote, Results, Run, SetScore
from afa.significance import crossed_test, difference_tests, set_test, sign_flip_tests
from afa.stats import Estimate, difference, differences, estimate, estimates, least_items

NOTES = {"right": MetricNote("image", True, "a scorer", True)}


def method(name: str, group: str, *runs: Any, parameters: int = 0) -> Method:
    """A method with the scores of each run by its seed: (seed, values)."""
    made = [Run(seed, "", {"right": [float(value) for value in values]}) for seed, values in runs]
    return Method(name, group, name.upper(), made, trained_parameters=parameters)


def results(captions: list[str], *methods: Method, notes: dict[str, MetricNote] = NOTES) -> Results:
    items = [Item(place, caption, place) for place, caption in enumerate(captions)]
    return Results({"name": "made", "training_seeds": 3}, items, notes, list(methods))


def captions(count: int) -> list[str]:
    return [f"scene {place}" for place in range(count)]


def trained_against(lost: Any, prompts: int = 30) -> Analysis:
    """AFA and a control with equal scores at every seed, which differ from seed to seed; the control's run 1 is `lost`."""
    rng = np.random.default_rng(0)
    same = {seed: rng.uniform(0.2 + 0.4 * (seed == 1), 0.3 + 0.4 * (seed == 1), prompts) for seed in range(3)}
    ours = method("afa", "ours", *same.items(), parameters=9)
    other = method("lora", "control", *({**same, 1: lost} if lost is not None else {0: same[0], 2: same[2]}).items(), parameters=9)
    return analyse([results(captions(prompts), method("single:a", "expert", (0, same[0])), ours, other)])[0]


@pytest.mark.parametrize("lost", [[math.nan] * 30, [0.5] * 12, [], None], ids=["no numbers", "too few", "none", "no run"])
def test_runs_are_paired_by_training_seed_when_one_is_lost(lost):
    one = trained_against(lost)
    found = one.lead.against("lora", "afa")
    assert found.difference.value == 0 and found.seeds == (0, 2) and found.verdict == "undecided"


def test_a_report_says_how_many_seeds_each_row_rests_on_and_never_three_where_two_are_left():
    one = trained_against([math.nan] * 30)
    rows = {row.cells[0]: row for row in main_table(one, one.lead, brief=True).rows}
    seeds = main_table(one, one.lead, brief=True).headers.index("seeds")
    assert rows["AFA"].cells[seeds] == "3" and str(rows["LORA"].cells[seeds]).startswith("2 of 3 (")
    assert rows["A" if "A" in rows else "SINGLE:A"].cells[seeds] is None
    for words in (as_text(one), as_html([one], ["made"])):
        assert "2 of 3 (" in words and "2 to 3 shared training seeds" in words
    lines = [line for line in csv.DictReader(io.StringIO(as_csv([one], ["made"]))) if line["method"] == "lora"]
    assert {line["training_seeds"] for line in lines} == {"2"}
    assert {line["versus"]: line["shared_seeds"] for line in lines} == {"single:a": "2", "afa": "2"}


def test_methods_without_a_shared_training_seed_are_not_compared_and_that_is_said():
    values = np.random.default_rng(1).uniform(size=20)
    bad = [math.nan] * 20
    ours = method("afa", "ours", (0, values), (1, bad), parameters=9)
    other = method("lora", "control", (0, bad), (1, values + 0.5), parameters=9)
    one = analyse([results(captions(20), method("single:a", "expert", (0, values)), ours, other)])[0]
    assert one.lead.against("lora", "afa") is None and "right of LORA minus AFA: they share no training seed" in one.problems


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tests_of_values_that_are_no_numbers_are_refused(value):
    sample = np.ones((3, 20))
    sample[1, 4] = value
    for test in (sign_flip_tests, difference_tests):
        with pytest.raises(ValueError, match="no finite numbers"):
            test([sample])
    with pytest.raises(ValueError, match="no finite numbers"):
        crossed_test(sample)
    with pytest.raises(ValueError, match="no finite numbers"):
        set_test(np.ones(3), sample)


def test_one_item_has_no_brackets_and_makes_no_claim():
    found = estimate(np.array([0.3]))
    assert "[" not in str(found) and not found.has_interval and not found.excludes_zero
    assert difference(np.array([0.9]), np.array([0.1])).verdict == "not distinguishable from"
    one = analyse([results(["one scene"], method("single:a", "expert", (0, [0.1])), method("afa", "ours", (0, [0.9])))])[0]
    assert "[" not in as_text(one) and "not distinguishable" in headlines(one)[0].lead
    assert "none is possible here" in terms(one)


@pytest.mark.parametrize("prompts", [5, 6])
def test_a_claim_needs_as_many_prompts_as_the_sign_flip_test_can_decide_on(prompts):
    """2 / 2^5 is above .05, whatever the scores; 2 / 2^6 is below."""
    rng = np.random.default_rng(2)
    ours, expert = rng.uniform(0.8, 0.9, prompts), rng.uniform(0.1, 0.2, prompts)
    one = analyse([results(captions(prompts), method("single:a", "expert", (0, expert)), method("afa", "ours", (0, ours)))])[0]
    assert one.lead.against("afa", "single:a").verdict == ("better" if prompts == 6 else "undecided")
    assert f"{prompts} independent prompts" in terms(one) and "at least 6 independent prompts" in terms(one)
    assert [least_items(family) for family in (1, 2, 106)] == [6, 7, 13]
    assert least_items(106) == next(n for n in range(1, 99) if 106 * 2 / 2**n < 0.05)


def test_a_score_of_sets_makes_no_claim_from_few_prompts_either():
    """Its p is against a normal distribution, which may be as small as one likes."""
    rng = np.random.default_rng(3)
    notes = {"fid": MetricNote("set", False, "a distance", True)}

    def scored(name: str, group: str, value: float) -> Method:
        return Method(name, group, name, [Run(0, "", {}, {"fid": SetScore(value, list(value + rng.normal(0, 0.1, 50)), 40)})])

    for prompts, verdict in ((4, "undecided"), (20, "better")):
        made = results([f"scene {place % prompts}" for place in range(40)], scored("single:a", "expert", 90), scored("afa", "ours", 10), notes=notes)
        one = analyse([made])[0]
        assert one.lead.against("afa", "single:a").verdict == verdict
        assert "for this number of images" in main_table(one, one.lead).note


@pytest.mark.parametrize("spelling", ["{}", " {} ", "{}\u00a0"])
def test_a_prompt_that_stands_five_times_is_one_prompt_with_five_images(spelling):
    rng = np.random.default_rng(4)
    ours, expert = rng.uniform(size=(5, 30)), rng.uniform(size=(5, 30))
    texts = captions(30)
    repeated = [*texts, *(spelling.format(text) for _ in range(4) for text in texts)]
    one = analyse([results(repeated, method("single:a", "expert", (0, expert.ravel())), method("afa", "ours", (0, ours.ravel())))])[0]
    averaged = results(texts, method("single:a", "expert", (0, expert.mean(0))), method("afa", "ours", (0, ours.mean(0))))
    once = analyse([averaged])[0]
    found, wanted = one.lead.against("afa", "single:a"), once.lead.against("afa", "single:a")
    assert one.prompts == 30 and found.prompts == 30 and found.p == pytest.approx(wanted.p)
    assert vars(found.difference) == pytest.approx(vars(wanted.difference)) and found.wins.n == 30


def test_a_score_may_be_called_seconds_without_being_taken_for_the_time():
    values = np.random.default_rng(5).uniform(5, 6, 20)
    notes = {"seconds": MetricNote("image", True, "a scorer", True)}
    methods = [
        Method(name, group, name, [Run(0, "", {"seconds": list(values)}, seconds=[0.1] * 20)])
        for name, group in (("single:a", "expert"), ("afa", "ours"))
    ]
    one = analyse([results(captions(20), *methods, notes=notes)])[0]
    assert one.lead.values["afa"].value == pytest.approx(values.mean()) and one.seconds["afa"].value == pytest.approx(0.1)


def coverage(draw: Any, truth: float, compute: Any, count: int = 300) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in (compute(draw()) for _ in range(count))]))


@pytest.mark.parametrize("prompts", [10, 20, 40])
def test_intervals_near_the_ceiling_cover_the_truth_and_have_a_width(prompts):
    """Scores of one question and of six, span known from other methods; the plain bootstrap covers .39 to .91 of these."""
    rng = np.random.default_rng(6)
    for questions, right in ((1, 0.95), (6, 0.97), (6, 0.99)):

        def draw(questions: int = questions, right: float = right) -> Any:
            return rng.binomial(questions, right, (1, prompts)) / questions

        assert coverage(draw, right, lambda sample: estimates([sample], span=(0.0, 1.0))[0]) >= 0.925
    assert estimates([np.ones((1, prompts))], span=(0.0, 1.0))[0].has_interval


def test_intervals_of_unbounded_scores_and_differences_cover_as_often_as_they_say():
    rng = np.random.default_rng(7)
    assert 0.91 <= coverage(lambda: rng.normal(3, 1, (1, 20)), 3, lambda sample: estimates([sample])[0]) <= 0.99
    assert 0.91 <= coverage(lambda: rng.normal(0, 1, (1, 20)), 0, lambda sample: differences([sample])[0]) <= 0.99


def test_padding_ends_at_sixty_prompts_and_leaves_the_value_alone():
    for prompts in (59, 60):
        values = np.random.default_rng(8).exponential(1, prompts)
        found, counts = estimate(values), np.random.default_rng(0)
        plain = np.quantile(values[counts.integers(prompts, size=(10_000, prompts))].mean(1), [0.025, 0.975])
        assert found.value == pytest.approx(values.mean())
        assert (prompts == 60) == np.allclose((found.low, found.high), plain, rtol=1e-9)


def test_three_seeds_that_lie_apart_are_no_certainty_however_many_prompts_there_are():
    """Each seed shifts all prompts: the sign-flip p of the means is tiny, and says nothing of other seeds."""
    rng = np.random.default_rng(9)
    sample = np.array([[0.01], [0.03], [0.08]]) + 0.02 * rng.normal(size=(3, 100))
    assert sign_flip_tests([sample])[0] < 1e-4 and difference_tests([sample])[0] > 0.05
    alike = 0.04 + 0.02 * rng.normal(size=(3, 100))
    assert difference_tests([alike])[0] < 1e-4
    assert difference_tests([sample[:2]]) == sign_flip_tests([sample[:2]])  # two seeds: about these


def test_the_crossed_test_keeps_its_level_whatever_the_spread_of_seeds():
    rng = np.random.default_rng(10)
    for apart in (0.0, 0.02, 0.1):
        p = [crossed_test(apart * rng.normal(size=(3, 1)) + 0.1 * rng.normal(size=(1, 40)) + 0.1 * rng.normal(size=(3, 40))) for _ in range(300)]
        assert np.mean(np.array(p) < 0.05) <= 0.09


def test_below_three_seeds_the_interval_is_over_prompts_for_these_models_and_the_seeds_stand_beside():
    rng = np.random.default_rng(11)
    runs = [(seed, rng.uniform(0.7 + 0.1 * seed, 0.8 + 0.1 * seed, 40)) for seed in range(2)]
    expert = method("single:a", "expert", (0, rng.uniform(0.1, 0.2, 40)))
    one = analyse([results(captions(40), expert, method("afa", "ours", *runs, parameters=9))])[0]
    both = np.stack([values for _, values in runs])
    assert vars(one.lead.values["afa"]) == pytest.approx(vars(estimates([both.mean(0)[None]], span=(0, 1))[0]))
    lead = headlines(one)[0].lead
    assert "as trained here (2 seeds), is better than" in lead and "with seed 0" in lead and "with seed 1" in lead
    assert "these trained models" in terms(one)


def test_a_verdict_of_a_reversed_comparison_keeps_its_seeds():
    one = trained_against([math.nan] * 30)
    found, back = one.lead.against("lora", "afa"), one.lead.against("afa", "lora")
    assert back.seeds == found.seeds and back.by_seed == tuple(-value for value in found.by_seed)


def test_equal_methods_differ_by_nothing_and_show_no_false_interval():
    values = np.random.default_rng(12).uniform(size=(1, 20))
    found = differences([values - values], span=(-1.0, 1.0))[0]
    assert found == Estimate(0.0, 0.0, 0.0, 20) and found.words(3, signed=True) == "+0.000"


def test_the_training_record_is_read_with_the_same_care():
    """One held-out image decides nothing."""
    from afa.checkpoint.gains import gains

    alone = dataclasses.asdict(Estimate(-0.2, -0.2, -0.2, 1))
    record = {"best_expert": "a", "steps": 4, "best_step": 2, "difference_to_best_expert": alone, "difference_to_untrained": alone}
    words = " ".join(gains(record))
    assert "not distinguishable from that of the untrained ensemble: -0.20000, and from that of its best expert, a: -0.20000" in words
    assert "1 image, a claim needs at least 6" in words and "[" not in words and "gain over the best expert" not in words


@pytest.mark.parametrize("experts", [["photo"], []])
def test_one_expert_alone_is_not_trained_as_an_ensemble(experts):
    from afa.errors import UserError
    from afa.training.settings import TrainSettings

    with pytest.raises(UserError, match="at least two experts"):
        TrainSettings(experts=experts, data="data", output="out")
