"""Options of the sampling-time methods: what is understood, what is refused, and in which words."""

import dataclasses
import subprocess
import sys

import pytest

from afa.errors import UserError
from afa.sampling.average import Interval, at, equal_intervals, read_table
from afa.sampling.registry import SAMPLING_METHODS, explain, make_options, read_options
from afa.settings import shares

NAMES = ["curves", "angles"]


def test_options_are_known_without_torch():
    script = "import sys, afa.generation.settings, afa.evaluation.names\nassert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_every_method_and_option_is_explained():
    text = explain()
    for name, method in SAMPLING_METHODS.items():
        assert f"  {name} " in text and method.help in text
        assert all(f"    {field.name} " in text for field in dataclasses.fields(method.options))


@pytest.mark.parametrize(
    ("method", "texts", "expected"),
    [
        ("noise_average", ["weights=2,1,0.5"], {"weights": [2.0, 1.0, 0.5]}),
        ("magicfusion", ["mode=2", "t0=600", "general=curves"], {"mode": 2, "t0": 600.0, "general": "curves"}),
        ("timestep_experts", ["table=1000-700:a=b,700-0:c"], {"table": "1000-700:a=b,700-0:c"}),
        ("superdiff_or", ["density=theorem", "temperature=0"], {"density": "theorem", "temperature": 0.0}),
    ],
)
def test_values_are_read_in_their_types(method, texts, expected):
    options = read_options(method, texts)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "texts", "sentence"),
    [
        ("magicfuson", [], "did you mean 'magicfusion'"),
        ("magicfusion", ["t=600"], "there is no option of magicfusion, 't'"),
        ("magicfusion", ["k_generl=1"], "did you mean 'k_general'"),
        ("noise_average", ["t0=600"], "t0 is an option of magicfusion, not of noise_average, which has weights"),
        ("feature_mean", ["weights=1,2"], "weights is an option of random_expert, noise_average, superdiff_or, not of feature_mean, which has none"),
        ("feature_mean", ["x=1"], "method feature_mean has no options; leave out x"),
        ("magicfusion", ["t0"], "t0 has no value; write KEY=VALUE"),
        ("magicfusion", ["t0=1", "t0=2"], "t0 is given twice, as 1 and as 2"),
        ("magicfusion", ["t0=late"], "t0=late is not a number"),
        ("magicfusion", ["t0=nan"], "t0 nan is no finite number"),
        ("magicfusion", ["mode=1.5"], "mode=1.5 is not a whole number"),
        ("magicfusion", ["mode=3"], "mode 3 is too large; the most is 2"),
        ("magicfusion", ["k_expert=-1"], "k_expert -1 is too small"),
        ("magicfusion", ["saliency_reference=genral"], "did you mean 'general'"),
        ("noise_average", ["weights=1;2"], "weights=1;2 is not numbers with commas"),
        ("superdiff_or", ["temperature=-1"], "temperature -1 is too small"),
        ("superdiff_and", ["weights=1,2"], "weights is an option of .*, not of superdiff_and, which has lift"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(method, texts, sentence):
    with pytest.raises(UserError, match=sentence):
        read_options(method, texts)


def test_options_in_python_are_checked_alike():
    assert make_options("noise_average", {"weights": [1, 2]}).weights == [1, 2]
    with pytest.raises(UserError, match="did you mean 'weights'"):
        make_options("noise_average", {"weight": [1, 2]})


def test_shares_have_sum_one_in_any_unit():
    assert shares([2, 1, 1], 3) == (0.5, 0.25, 0.25)
    assert shares(None, 4) == (0.25,) * 4
    for weights, sentence in (([1, 1], "2 weights for 3 experts"), ([1, 1, -1], "1 1 -1 are no shares"), ([0, 0, 0], "sum above 0")):
        with pytest.raises(UserError, match=sentence):
            shares(weights, 3)


@pytest.mark.parametrize(("count", "steps"), [(1, 1000), (2, 1000), (3, 1000), (7, 100)])
def test_every_timestep_has_one_of_the_equal_intervals(count, steps):
    names = [f"expert_{index}" for index in range(count)]
    table = equal_intervals(names, steps)
    owners = [[entry.expert for entry in table if entry.start > t >= entry.end] for t in range(steps)]
    assert all(len(owner) == 1 for owner in owners)
    assert owners == [[at(table, t).expert] for t in range(steps)]
    assert [owner[0] for owner in owners] == sorted((owner[0] for owner in owners), reverse=True)  # the first expert in the noise
    sizes = [entry.start - entry.end for entry in table]
    assert max(sizes) - min(sizes) <= 1


def test_a_table_is_read_in_any_order_and_an_expert_may_come_back():
    table = read_table("300-0:curves, 1000-700:curves,700-300:angles", NAMES, 1000)
    assert table == [Interval(1000, 700, "curves"), Interval(700, 300, "angles"), Interval(300, 0, "curves")]
    assert [at(table, t).expert for t in (999, 700, 699.5, 300, 299.9, 0)] == ["curves", "curves", "angles", "angles", "curves", "curves"]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("1000-700:curves,600-0:angles", "no expert is given for 700-600; 600-0:angles must start at 700"),
        ("1000-500:curves,700-0:angles", "700-0:angles overlaps the interval before it; it must start at 500"),
        ("900-0:curves", "no expert is given for 1000-900"),
        ("1100-0:curves", "1100-0:curves overlaps 1000 timesteps; it must start at 1000"),
        ("1000-10:curves", "no expert is given for 10-0"),
        ("1000-0:curvs", "did you mean 'curves'"),
        ("0-1000:curves", "FROM above TO"),
        ("1000-0", "'1000-0' is no interval"),
        ("1000-0.5:curves", "whole timesteps"),
        ("", "'' is no interval"),
        ("1000-500:curves,1000-500:angles,500-0:angles", "1000-500:angles overlaps the interval before it; it must start at 500"),
    ],
)
def test_tables_with_gaps_or_overlaps_are_refused(table, sentence):
    with pytest.raises(UserError, match=sentence):
        read_table(table, NAMES, 1000)
