"""Laws of the sentence on top of each report: what the intervals leave open is undecided; better and worse are only what was decided."""

import dataclasses

import numpy as np
import pytest
from made_pages import explained_image
from made_results import made_results

from afa.evaluation.compare import analyse
from afa.evaluation.report.headline import advice
from afa.explanation.causes import Unused
from afa.explanation.page import advice as explanation_advice
from afa.pages.advice import (
    AHEAD,
    ENSEMBLE,
    MERGE,
    ONE,
    UNKNOWN,
    VISIBLE,
    Candidate,
    for_comparison,
    for_demonstration,
    for_explanation,
    for_screening,
    leaders,
    some,
)
from afa.pages.numbers import MINUS
from afa.stats import Estimate, least_items


def about(value: float, width: float = 0.01, n: int = 30) -> Estimate:
    return Estimate(value, value - width, value + width, n)


def candidate(title: str, *verdicts: str, difference: float = 0.1, seconds: float | None = None, role: str = "") -> Candidate:
    return Candidate(title, verdicts, about(difference), None if seconds is None else about(seconds), role)


def compared(*others: Candidate, seconds: float | None = 0.8, few: str = "") -> str:
    return str(for_comparison("AFA", None if seconds is None else about(seconds), "attributes", others, few, ""))


class TestComparison:
    def test_what_is_better_than_all_is_to_be_used_with_its_gains_and_its_cost(self):
        said = compared(
            candidate("patterns", "better", difference=0.12, seconds=0.2, role="the best single expert"),
            candidate("TIES", "better", difference=0.2, role="the best merge"),
        )
        assert said.startswith("Use AFA: by attributes it is better than all 2 others.")
        assert "better than the best single expert, patterns (+0.120 [+0.110, +0.130])" in said and "the best merge, TIES (+0.200" in said
        assert said.endswith("An image takes 0.80 [0.79, 0.81] s with AFA and 0.20 [0.19, 0.21] s with patterns.")

    def test_one_undecided_comparison_makes_the_advice_undecided(self):
        said = compared(candidate("patterns", "better"), candidate("router", "undecided", seconds=0.9))
        assert said.startswith("Undecided: AFA is not told apart from router by attributes") and "Use AFA" not in said
        assert "costs less" not in said  # it costs more

    def test_of_undecided_methods_the_one_that_surely_costs_less_is_recommended(self):
        said = compared(candidate("router", "undecided", seconds=0.5), candidate("merge", "undecided", seconds=0.2))
        assert "merge costs less, so use it until more prompts decide" in said
        assert "costs less" not in compared(candidate("merge", "undecided", seconds=0.795))  # the intervals overlap
        assert "costs less" not in compared(candidate("merge", "undecided"))  # not measured

    def test_what_is_worse_is_not_to_be_used(self):
        said = compared(candidate("LoRA", "worse", difference=-0.1), candidate("router", "worse", difference=-0.2), candidate("merge", "better"))
        assert said.startswith("Use router, not AFA: by attributes it is better; 1 other is, too.")
        assert f"worse than router ({MINUS}0.200" in said

    def test_leading_metrics_that_contradict_each_other_decide_nothing(self):
        assert candidate("x", "better", "worse").verdict == candidate("x", "worse", "better").verdict == "undecided"
        assert candidate("x", "better", "undecided").verdict == "better"
        assert "another metric says the opposite of attributes about x" in compared(candidate("x", "better", "worse"))

    def test_too_few_prompts_are_said(self):
        assert "; 12 prompts are needed" in compared(candidate("x", "undecided"), few="; 12 prompts are needed for that, here are 3")
        assert compared() == "Undecided: AFA was compared with no other method by attributes."

    def test_the_advice_of_results_follows_their_corrected_verdicts(self):
        results = made_results(prompts=14, copies=1, runs=1, studies=False, resamples=60, few=True)
        one = analyse([results])[0]
        verdicts = {name: one.lead.against("afa", name).verdict for name in one.methods if name != "afa" and one.methods[name].group != "bound"}
        said = advice(one)
        assert ("Use AFA" in said.sentence) == (set(verdicts.values()) == {"better"}) and one.title(one.lead.best) in said.because
        few = advice(analyse([made_results(prompts=4, copies=1, runs=1, studies=False, resamples=60, few=True)])[0])
        assert few.sentence.startswith("Undecided") and "prompts are needed for that, here are 4" in few.sentence and "better than" not in str(few)

    def test_without_our_method_the_advice_is_about_the_best_expert_and_without_experts_there_is_none(self):
        results = made_results(prompts=14, copies=1, runs=1, studies=False, resamples=60, few=True)
        rivals = [method for method in results.methods if method.group != "ours"]
        said = str(advice(analyse([dataclasses.replace(results, methods=rivals)])[0]))
        assert "AFA" not in said and "patterns" in said
        merges = [method for method in results.methods if method.group == "merge"]
        assert "neither our method nor a single expert" in str(advice(analyse([dataclasses.replace(results, methods=merges)])[0]))


class TestScreening:
    def test_the_sentence_of_the_issue(self):
        assert str(for_screening(ENSEMBLE, ["a", "c"], ["b"], [], True, 0.01)) == "Yes: combining a and c should pay; drop b."

    @pytest.mark.parametrize("action", [ENSEMBLE, MERGE, ONE])
    def test_what_the_intervals_leave_open_is_called_undecided_and_nothing_else_is(self, action):
        assert "ndecided" in str(for_screening(action, ["a", "c"], ["b"], [], False, 0.01))
        assert "ndecided" not in str(for_screening(action, ["a", "c"], ["b"], [], True, 0.01))

    def test_an_expert_that_may_add_something_is_not_dropped(self):
        said = str(for_screening(ENSEMBLE, ["a", "c"], ["b"], ["d"], True, 0.01))
        assert said.endswith("drop b; whether d would add 1 % is undecided.")
        assert str(for_screening(UNKNOWN, ["a"], ["b"], [], False, 0.01)).startswith("Undecided: without captioned images")


def shares(images: int, lead: float, spread: float = 0.0, groups: int = 1) -> np.ndarray:
    """(images, groups, 2): the first expert ahead by `lead`, every second image by `spread` more or less."""
    gap = lead + spread * np.where(np.arange(images) % 2, 1, -1)
    return np.stack([0.5 + gap / 2, 0.5 - gap / 2], axis=1)[:, None].repeat(groups, 1)


class TestExplanation:
    def test_to_lead_is_to_be_ahead_by_more_than_a_hundredth(self):
        assert leaders(shares(1, AHEAD * 1.1)) == [0] and leaders(shares(1, AHEAD * 0.9)) == [None]
        assert leaders(shares(1, -0.2)) == [1] and leaders(shares(1, 0)) == [None]

    def test_few_images_must_agree(self):
        assert leaders(shares(3, 0.1, 0.05)) == [0] and leaders(shares(3, 0.1, 0.2)) == [None]

    def test_with_many_images_the_interval_decides_after_holm(self):
        assert leaders(shares(40, 0.1, 0.2)) == [0] and leaders(shares(40, 0.02, 0.4)) == [None]
        enough = least_items()
        assert leaders(shares(enough, 0.1)) == [0] and leaders(shares(enough, 0.1, groups=8)) == [None] * 8

    @pytest.mark.parametrize(
        ("values", "verdict"),
        [
            ([VISIBLE + 0.1], "The weights matter"),
            ([VISIBLE - 0.1], "The weights hardly matter"),
            ([1.0, 9.0], "Undecided whether the weights matter"),
            ([5.0, 9.0], "The weights matter"),
            ([1.0, 5.0] * 20, "Undecided whether the weights matter"),
            ([4.0, 5.0] * 20, "The weights matter"),
        ],
    )
    def test_weights_matter_where_the_change_is_surely_visible(self, values, verdict):
        said = str(for_explanation(["a", "b"], ["IN"], shares(len(values), 0.3), [], ("equal weights", np.asarray(values))))
        assert said.startswith(f"{verdict}: with equal weights, ")

    def test_an_unused_expert_and_what_was_not_tried_are_said(self):
        said = str(for_explanation(["a", "b"], ["IN", "OUT"], shares(1, 0.3, groups=2), ["b"], None))
        assert said == "Whether the weights matter was not tried (--counterfactuals equal). On this image, a leads in IN and OUT; b is not used."

    def test_the_advice_of_images_is_read_from_what_is_saved(self):
        entries = [explained_image(f"{place:05d}", ["IN", "OUT"], np.asarray([[0.9, 0.1], [0.5, 0.5]])) for place in range(2)]
        unused = Unused(("a", "b"), ("IN00", "OUT00"), np.full((4, 2, 2), 0.3, np.float32), np.ones(2))
        said = explanation_advice(entries, unused)
        assert said.sentence == "The weights matter: with equal weights, each of these 2 images changes by 20.0 of 255 levels (RMSE)."
        assert said.because == "On each of these 2 images, a leads in IN and in OUT none leads in all of them; every expert is used."


def test_a_demonstration_says_what_was_seen_and_no_more():
    said = str(for_demonstration(about(0.95, n=80), 3, 7, [("the best expert", "better"), ("the router", "undecided"), ("the mean", "better")]))
    assert "7 ways to draw with 3 experts" in said and said.endswith("better than the best expert and the mean; undecided against the router.")


def test_long_lists_are_counted():
    assert some(["a"]) == "a" and some(["a", "b", "c"]) == "a, b and c" and some(list("abcdef")) == "a, b, c and 3 others"
