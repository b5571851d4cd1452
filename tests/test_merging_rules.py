"""The laws of every merge of the table, on one key's tensors, and a case of each computed by hand."""

import dataclasses
import math
from typing import Annotated

import pytest
import torch
from torch import Tensor

from afa.cli.merge import listed
from afa.errors import UserError
from afa.merging.block_weights import mbw
from afa.merging.keys import merge_key
from afa.merging.registry import MERGES, check_merge, find_merge
from afa.merging.rules import (
    GIVEN,
    Merge,
    Option,
    add_difference,
    dare,
    model_stock,
    slerp,
    task_arithmetic,
    ties,
    weighted,
)
from afa.merging.settings import FLAGS

REQUIRED = {"mbw": {"weights": {"base": (0.25, 0.75)}}}
# method -> options under which the result is the named tensor: 0, 1 of the experts, or the base
ENDS = [
    ("weighted", {"weights": (1, 0)}, 0),
    ("weighted", {"weights": (0, 2)}, 1),
    ("mbw", {"weights": {"base": (1, 0)}}, 0),
    ("mbw", {"weights": {"base": (0, 1)}}, 1),
    ("slerp", {"t": 0.0}, 0),
    ("slerp", {"t": 1.0}, 1),
    ("add_difference", {"alpha": 0.0}, 0),
    ("task_arithmetic", {"scale": 0.0}, "base"),
    ("ties", {"scale": 0.0}, "base"),
    ("dare", {"scale": 0.0}, "base"),
]
# what makes a single expert, or several equal ones, the result: options for N experts
WHOLE = {
    "task_arithmetic": lambda n: {"scale": 1 / n},
    "ties": lambda n: {"density": 1.0, "scale": 1.0},
    "dare": lambda n: {"drop": 0.0, "scale": 1 / n},
    "model_stock": lambda n: {},
}


def tensors(count: int, shape: tuple[int, ...] = (4, 4), dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def merge(method: str, experts: list[Tensor], base: Tensor | None = None, **options) -> Tensor:
    given = base if MERGES[method].needs("base") else None
    return merge_key(find_merge(method).rule, experts, given, key="unet.k", **{**REQUIRED.get(method, {}), **options})


def options_of(method: str) -> list[str]:
    return [field.name for field in dataclasses.fields(MERGES[method].options)]


def test_every_flag_is_an_option_and_the_help_tells_those_without_a_flag():
    assert set(FLAGS) <= {option for method in MERGES for option in options_of(method)}
    assert all(field.metadata["help"] in listed(MERGES) for merge in MERGES.values() for field in dataclasses.fields(merge.options) if field.name not in FLAGS)
    assert all(merge.name == name for name, merge in MERGES.items())


def pulled(tensors, *, base, pull: Annotated[float, Option("how far from the base", least=0, most=1)] = 0.5):
    """A toy. pull: how far. Source: none."""
    return base + pull * (tensors[0] - base)


def test_the_help_tells_the_options_of_a_merge_of_your_own():
    told = listed({**MERGES, "pulled": Merge(pulled, title="toy", help="base + pull (A - base)", row="a toy", experts=1)})
    assert told.startswith(f"{listed(MERGES)}\n  pulled ")
    assert told.endswith("--method-option pull=…: how far from the base (default: 0.5)")


@pytest.mark.parametrize("method", MERGES)
def test_every_merge_says_what_it_does_and_where_it_is_from(method):
    merge = MERGES[method]
    assert "Source:" in merge.rule.__doc__
    assert all(f"{option}:" in merge.rule.__doc__ for option in options_of(method) if option != "base_alpha")  # of stage_weights
    assert merge.title and merge.help and merge.row
    assert all(field.metadata["help"] for field in dataclasses.fields(merge.options))


@pytest.mark.parametrize(("method", "options", "end"), ENDS)
def test_the_end_points_are_the_tensors_themselves(method, options, end):
    first, second, base = tensors(3)
    expected = {0: first, 1: second, "base": base}[end]
    assert torch.equal(merge(method, [first, second], base, **options), expected)


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_identical_inputs_change_nothing_bit_for_bit(method, dtype):
    (tensor,) = tensors(1, (8, 3), dtype)
    assert torch.equal(merge(method, [tensor, tensor.clone()], tensor.clone()), tensor)


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("count", [1, 3])
def test_equal_experts_of_another_base_give_that_expert(method, count):
    expert, base = tensors(2)
    merged = merge(method, [expert.clone() for _ in range(count)], base, **WHOLE[method](count))
    torch.testing.assert_close(merged, expert, atol=1e-6, rtol=0)


def test_the_difference_from_the_first_itself_leads_to_the_second():
    first, second = tensors(2)
    torch.testing.assert_close(add_difference([first, second], base=first, alpha=1.0), second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["weighted", "task_arithmetic", "ties", "model_stock"])
def test_the_order_of_experts_is_irrelevant(method):
    *experts, base = tensors(4)
    torch.testing.assert_close(merge(method, experts, base), merge(method, experts[::-1], base), atol=1e-6, rtol=0)


def test_weights_go_with_their_experts():
    experts = tensors(3)
    torch.testing.assert_close(weighted(experts, weights=(3, 2, 1)), weighted(experts[::-1], weights=(1, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(experts[:2], t=0.3), slerp(experts[1::-1], t=0.7), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (4, 4), (3, 2, 1, 1)])
def test_dtype_and_shape_are_kept(method, dtype, shape):
    *experts, base = tensors(3, shape, dtype)
    merged = merge(method, experts, base)
    assert (merged.dtype, merged.shape) == (dtype, shape)
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("method", MERGES)
def test_inputs_stay_as_they_are_and_are_not_handed_out(method):
    *experts, base = tensors(3)
    before = [tensor.clone() for tensor in (*experts, base)]
    merge(method, experts, base).zero_()
    assert all(torch.equal(now, then) for now, then in zip((*experts, base), before, strict=True))


@pytest.mark.parametrize("method", MERGES)
def test_whole_numbers_are_the_first_experts(method):
    first, second = torch.arange(4), torch.arange(4) + 7
    assert torch.equal(merge(method, [first, second], first), first)


@pytest.mark.parametrize("method", MERGES)
def test_half_precision_is_computed_in_single(method):
    *experts, base = tensors(3, (16, 16), torch.float16)
    fine = merge(method, [tensor.float() for tensor in experts], base.float())
    assert torch.equal(merge(method, experts, base), fine.half())


# 4×4 cases, computed by hand

ONES = torch.ones(4, 4)
CORNER = torch.zeros(4, 4).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0))
BESIDE = torch.zeros(4, 4).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(1.0))


def test_weighted_by_hand():
    assert torch.equal(weighted([ONES, 3 * ONES, 5 * ONES], weights=(2, 1, 1)), 3 * ONES - 0.5)  # 0.5 + 0.75 + 1.25
    assert torch.equal(weighted([ONES, 3 * ONES]), 2 * ONES)


def test_mbw_by_hand():
    weights = {"base": (1, 0), "IN00": (0.25, 0.75)}
    assert torch.equal(mbw([ONES, 3 * ONES], stage="IN00", weights=weights), 2.5 * ONES)
    assert torch.equal(mbw([ONES, 3 * ONES], stage="base", weights=weights), ONES)


def test_add_difference_by_hand():
    assert torch.equal(add_difference([ONES, 4 * ONES], base=2 * ONES, alpha=0.5), 2 * ONES)  # 1 + (4 - 2) / 2


def test_task_arithmetic_by_hand():
    assert torch.equal(task_arithmetic([2 * ONES, 5 * ONES], base=ONES, scale=0.5), 3.5 * ONES)  # 1 + (1 + 4) / 2


def test_slerp_by_hand():
    """A quarter circle from length 1 to length 3: half-way at 45 degrees, with length 2."""
    torch.testing.assert_close(slerp([CORNER, 3 * BESIDE], t=0.5), math.sqrt(2) * (CORNER + BESIDE))


@pytest.mark.parametrize("other", [2 * CORNER, -CORNER, torch.zeros(4, 4)], ids=["parallel", "opposite", "zero"])
def test_slerp_without_an_angle_is_the_straight_line(other):
    torch.testing.assert_close(slerp([CORNER, other], t=0.25), 0.75 * CORNER + 0.25 * other)


def test_ties_by_hand():
    """Three differences; a quarter of each (4 of 16) is kept; the signs are elected, those that lose do not count."""
    one, two, three = torch.zeros(3, 4, 4).unbind()
    one[0], one[1] = torch.tensor([4.0, 4.0, -4.0, 4.0]), 0.5  # the second row is trimmed away
    two[0] = torch.tensor([2.0, -8.0, -2.0, 2.0])
    three[0] = torch.tensor([3.0, 1.0, 1.0, -9.0])
    expected = torch.zeros(4, 4)
    expected[0] = torch.tensor([3.0, -8.0, -3.0, -9.0])  # (4+2+3)/3; -8 outvotes 4+1; (-4-2)/2; -9 outvotes 4+2
    assert torch.equal(ties([ONES + one, ONES + two, ONES + three], base=ONES, density=0.25), ONES + expected)
    assert torch.equal(ties([ONES + one, ONES + two, ONES + three], base=ONES, density=0.25, scale=0.5), ONES + expected / 2)


def test_ties_keeps_the_asked_fraction():
    (expert,) = tensors(1, (10, 10))
    assert (ties([expert], base=torch.zeros(10, 10), density=0.37) != 0).sum() == 37


def test_dare_by_hand():
    """Kept differences are doubled at p = 1/2, dropped ones are gone; which ones is fixed by seed and key."""
    merged = dare([3 * ONES], base=ONES, key="unet.k", drop=0.5, seed=0, scale=1.0)
    assert set(merged.flatten().tolist()) == {1.0, 5.0}
    kept = (merged == 5).int().tolist()
    assert kept == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0]]


def test_dare_drops_with_its_probability_and_keeps_the_mean():
    base, expert = torch.zeros(400, 400), torch.ones(400, 400)
    merged = dare([expert], base=base, key="k", drop=0.9, scale=1.0)
    assert (merged != 0).float().mean() == pytest.approx(0.1, abs=0.004)  # five standard deviations
    assert merged.mean() == pytest.approx(1.0, abs=0.04)


def test_dare_depends_on_seed_key_and_place_alone():
    (expert,) = tensors(1, (32, 32))
    options = {"base": torch.zeros(32, 32), "drop": 0.5}
    masks = [dare([expert], key=key, seed=seed, **options) != 0 for key, seed in [("a", 0), ("a", 0), ("b", 0), ("a", 1)]]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])
    both = dare([expert, expert], key="a", **options)
    assert not torch.equal(both != 0, masks[0])


def test_model_stock_by_hand():
    """Two differences at 60 degrees: cos 1/2, t = 2·½ / (1 + ½) = 2/3 of their mean (¾, √¾ / 2)."""
    second = 0.5 * CORNER + math.sqrt(0.75) * BESIDE
    expected = ONES + 0.5 * CORNER + math.sqrt(0.75) / 3 * BESIDE
    torch.testing.assert_close(model_stock([ONES + CORNER, ONES + second], base=ONES), expected)


def test_model_stock_of_unrelated_or_opposed_experts_is_their_base():
    torch.testing.assert_close(model_stock([ONES + CORNER, ONES + BESIDE], base=ONES), ONES)
    torch.testing.assert_close(model_stock([ONES + CORNER, ONES - 0.5 * CORNER], base=ONES), ONES)


REFUSALS = [
    ("weighed", 2, False, {}, "there is no merge 'weighed'; did you mean 'weighted'?"),
    ("weighted", 3, False, {"weights": [1, 2]}, "2 weights for 3 experts"),
    ("weighted", 2, False, {"weights": [1, -1]}, "weights 1 -1 are no shares"),
    ("weighted", 2, False, {"weights": [0, 0]}, "weights 0 0 are no shares"),
    ("weighted", 2, True, {}, "weighted takes no base"),
    ("weighted", 2, False, {"density": 0.5}, "weighted: there is no option 'density'"),
    ("model_stock", 2, True, {"t": 0.5}, "model_stock has no options, so it cannot take 't'"),
    ("mbw", 2, False, {}, "mbw needs weights"),
    ("slerp", 3, False, {}, "slerp is of exactly 2 experts, and 3 were given"),
    ("slerp", 2, False, {"t": 1.5}, "slerp: t 1.5 is too large; the most is 1"),
    ("dare", 2, True, {"drop": 1.0}, "dare: drop 1 is too large; it must be below 1"),
    ("ties", 2, True, {"scale": math.nan}, "ties: scale nan is no finite number"),
    *[(method, 2, False, {}, f"{method} adds what experts learnt to their base") for method in MERGES if MERGES[method].needs("base")],
]


@pytest.mark.parametrize(("method", "experts", "base", "options", "sentence"), REFUSALS)
def test_what_does_not_belong_to_a_merge_is_refused_in_one_sentence(method, experts, base, options, sentence):
    with pytest.raises(UserError) as refusal:
        check_merge(method, experts, base, options)
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_what_the_engine_gives_to_rules_is_none_of_their_options():
    assert all(name not in options_of(method) for method in MERGES for name in GIVEN)
