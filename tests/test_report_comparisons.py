"""Laws of comparisons: what is computed from results, and what may be said of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from made_results import made_results

from afa.errors import UserError
from afa.evaluation.columns import Comparison
from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.report.headline import headlines, terms
from afa.evaluation.results import Method, MetricNote, Results
from afa.significance import holm
from afa.stats import Estimate, difference, estimate, prompt_means


@pytest.fixture(scope="module")
def results() -> Results:
    return made_results(prompts=24, resamples=80, few=True)


@pytest.fixture(scope="module")
def one(results) -> Analysis:
    return analyse([results])[0]


def changed(results: Results, name: str, **scores: Any) -> Results:
    """With other scores of one method in all its runs; None: without them."""
    methods = []
    for method in results.methods:
        runs = [
            dataclasses.replace(run, scores={key: value for key, value in {**run.scores, **scores}.items() if value is not None})
            for run in method.runs
        ]
        methods.append(dataclasses.replace(method, runs=runs) if method.name == name else method)
    return dataclasses.replace(results, methods=methods)


def test_one_training_seed_is_the_plain_paired_difference(results, one):
    prompts = [item.prompt for item in results.items]
    scores = {method.name: prompt_means(method.runs[0].scores["attributes"], prompts) for method in results.methods}
    assert one.lead.best == "single:patterns"
    against = one.lead.against("ties", "single:patterns").difference
    assert vars(one.lead.values["ties"]) == pytest.approx(vars(estimate(scores["ties"])))
    assert vars(against) == pytest.approx(vars(difference(scores["ties"], scores["single:patterns"])))


def test_the_family_is_our_method_and_the_best_expert_against_every_row_but_the_bounds(one):
    rows = [method.name for method in one.rows if method.group != "bound"]
    assert one.family == len(one.primary) * (2 * len(rows) - 3)  # both references against all others, each other once
    assert all(
        (found.p_holm is None) == ("best_of_n" in pair) for pair, found in one.lead.comparisons.items() if ", " not in pair[0]
    )
    assert all(found.p_holm is None for found in one.columns["colours"].comparisons.values())


def test_corrected_p_is_holm_over_both_leading_metrics(one):
    claims = {
        (column.metric, *sorted(pair)): found
        for column in one.primary
        for pair, found in column.comparisons.items()
        if found.p_holm
    }
    assert len(claims) == one.family
    assert [found.p_holm for found in claims.values()] == pytest.approx(holm([found.p for found in claims.values()]))


def test_a_report_of_more_evaluations_corrects_for_all_of_them(results, one):
    both = analyse([results, made_results(prompts=10, copies=1, runs=1, studies=False, resamples=50, few=True)])
    assert both[0].family == both[1].family == 2 * one.family
    again = both[0].lead.comparisons
    assert all(again[pair].p_holm >= found.p_holm for pair, found in one.lead.comparisons.items() if found.p_holm is not None)


def test_the_order_of_methods_changes_no_number(results, one):
    back = analyse([dataclasses.replace(results, methods=results.methods[::-1])])[0]
    for metric, column in one.columns.items():
        other = back.columns[metric]
        assert column.best == other.best and column.comparisons.keys() == other.comparisons.keys()
        for pair, found in column.comparisons.items():
            assert vars(other.comparisons[pair].difference) == pytest.approx(vars(found.difference))
            assert (other.comparisons[pair].p, other.comparisons[pair].p_holm) == pytest.approx((found.p, found.p_holm))


def test_the_best_expert_has_the_lowest_value_where_lower_is_better(one):
    column = one.columns["frechet"]
    experts = {name: column.values[name].value for name in one.group("expert")}
    assert column.best == min(experts, key=experts.__getitem__)


def test_a_copy_of_our_method_is_never_better_nor_worse(results):
    ours = next(method for method in results.methods if method.name == "afa")
    copied = dataclasses.replace(ours, name="copy", group="control", title="copy")
    found = analyse([dataclasses.replace(results, methods=[*results.methods, copied])])[0]
    for column in found.primary:
        twin = column.against("afa", "copy")
        assert twin.difference == Estimate(0.0, 0.0, 0.0, twin.difference.n) and twin.p == twin.p_holm == 1.0
        assert twin.verdict == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "p", "higher", "verdict"),
    [
        (0.1, 0.3, 0.01, True, "better"),
        (0.1, 0.3, 0.01, False, "worse"),
        (-0.3, -0.1, 0.01, True, "worse"),
        (-0.1, 0.3, 0.01, True, "undecided"),  # the interval knows of other training seeds
        (0.1, 0.3, 0.2, True, "undecided"),  # too many comparisons for this one
        (0.1, 0.3, None, True, ""),
    ],
)
def test_a_verdict_needs_both_the_interval_and_the_corrected_p(low, high, p, higher, verdict):
    found = Comparison("a", "b", Estimate((low + high) / 2, low, high, 9), higher, 0.001, p_holm=p)
    assert found.verdict == verdict
    opposite = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert found.reversed.verdict == opposite and found.reversed.reversed == found


def test_variants_are_compared_on_the_training_seeds_they_have(results, one):
    prompts = [item.prompt for item in results.items]
    by_name = {method.name: method for method in results.methods}
    first = {name: prompt_means(by_name[name].runs[0].scores["attributes"], prompts) for name in ("afa", "afa, 10 steps")}
    assert len(by_name["afa"].runs) == 3 and len(by_name["afa, 10 steps"].runs) == 1
    found = one.lead.against("afa, 10 steps", "afa").difference
    assert vars(found) == pytest.approx(vars(difference(first["afa, 10 steps"], first["afa"])))


def test_a_score_of_the_first_images_only_rests_on_their_prompts(results):
    short = dataclasses.replace(
        results,
        methods=[
            dataclasses.replace(method, runs=[dataclasses.replace(run, scores={**run.scores, "colours": run.scores["colours"][:10]}) for run in method.runs])
            for method in results.methods
        ],
    )  # fmt: skip
    column = analyse([short])[0].columns["colours"]
    assert {found.n for found in column.values.values()} == {5}
    ties = next(method for method in results.methods if method.name == "ties").runs[0].scores["colours"]
    assert column.values["ties"].value == pytest.approx(np.mean(ties[:10]))


def test_scores_of_different_numbers_of_prompts_do_not_pair(results):
    short = changed(results, "ties", colours=[0.5] * 10)
    with pytest.raises(UserError, match="metric 'colours' has values of 5 prompts for 'ties', of 24 for"):
        analyse([short])


@pytest.mark.parametrize("lost", [None, [float("nan")] * 48])
def test_a_method_without_a_score_costs_only_itself(results, one, lost):
    found = analyse([changed(results, "ties", attributes=lost)])[0]
    assert "ties" not in found.lead.values and "ties" in found.columns["colours"].values
    assert found.lead.values["afa"] == one.lead.values["afa"]
    said = "attributes of TIES, training seed 0: some values are missing or no numbers"
    assert (said in found.problems) == (lost is not None)  # what evaluate left out it has explained itself


def test_seconds_are_estimates_over_prompts(results, one):
    prompts = [item.prompt for item in results.items]
    seconds = next(method for method in results.methods if method.name == "ties").runs[0].seconds
    assert vars(one.seconds["ties"]) == pytest.approx(vars(estimate(prompt_means(seconds, prompts))))


def test_what_nothing_can_be_computed_from_is_refused(results):
    empty = [
        dataclasses.replace(results, methods=[]),
        dataclasses.replace(results, metrics={"other": MetricNote("image", True, "")}),
    ]
    for found in empty:
        with pytest.raises(UserError, match="there is nothing to report"):
            analyse([found])
    with pytest.raises(UserError, match="two methods of the results are called 'afa'"):
        analyse([dataclasses.replace(results, methods=[*results.methods, next(m for m in results.methods if m.name == "afa")])])
    with pytest.raises(UserError, match="is of group 'rival', which is none of: expert"):
        analyse([dataclasses.replace(results, methods=[Method("x", "rival", "x", results.methods[0].runs)])])
    with pytest.raises(UserError, match="method 'x' has no runs"):
        analyse([dataclasses.replace(results, methods=[Method("x", "merge", "x", [])])])


def test_the_headline_says_better_only_of_those_that_are(one):
    headline = headlines(one)[0]
    said = dict(headline.kinds)
    assert "AFA is better than the best single expert, patterns: +0." in headline.lead and said["Merges"] == "better than all 3."
    undecided = [name for name in one.group("control") if one.lead.against("afa", name).verdict == "undecided"]
    assert undecided and all(f"{one.title(name)} (" in said["Controls"] for name in undecided)
    assert "Upper bounds" not in said and f"Holm's correction over {one.family} comparisons" in terms(one)


def test_the_headline_says_so_when_our_method_loses(results):
    lost = analyse([changed(results, "afa", attributes=[0.0] * len(results.items))])[0]
    headline = headlines(lost)[0]
    assert "AFA is worse than the best single expert" in headline.lead
    assert all(sentence.startswith("worse than ") for _, sentence in headline.kinds)
    assert "frechet (lower is better) AFA is better than" in headlines(lost)[1].lead  # the other metric is untouched


@pytest.mark.parametrize(("group", "said"), [("ours", "nothing is claimed"), ("expert", "there is no single expert")])
def test_without_experts_or_without_our_method_nothing_is_claimed(results, group, said):
    found = analyse([dataclasses.replace(results, methods=[method for method in results.methods if method.group != group])])[0]
    assert said in headlines(found)[0].lead
