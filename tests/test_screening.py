"""Head-room, distances and verdicts: the laws, and cases by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import sd_pipeline

from afa.experts.spec import ExpertSpec
from afa.merging.sources import open_source
from afa.screening.comparison import ExpertComparison, chance_agreement, routes
from afa.screening.distances import SAME, distances, features_apart
from afa.screening.plan import Probes
from afa.screening.verdict import (
    CALIBRATION,
    ENSEMBLE,
    MERGE,
    ONE,
    Evidence,
    Fit,
    Forecast,
    fits,
    forecast,
    judge,
    over,
)
from afa.stats import Estimate, gain


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestHeadRoom:
    def test_copies_of_one_expert_have_none(self):
        errors = noise(1, 4, 3, 5, 6).expand(3, -1, -1, -1, -1)
        found = routes(errors)
        assert [found.routed, found.routed_pixels] == pytest.approx([found.experts[0]] * 2)
        assert list(found.wins) == [1, 0, 0]

    def test_experts_that_are_right_in_places_of_their_own_are_routed_as_an_oracle_would(self):
        errors = noise(2, 4, 3, 5, 6)
        errors[0, ..., :3] *= 0.01
        errors[1, ..., 3:] *= 0.01
        found = routes(errors)
        assert found.routed == pytest.approx(found.element_oracle, rel=0.05)
        assert found.routed < 0.01 * found.experts[0]
        assert found.agreement > 0.98

    def test_what_only_the_noise_decides_gains_nothing(self):
        found = routes(noise(3, 6, 4, 16, 16))
        assert found.element_oracle < 0.5 * found.experts.min()
        assert found.routed == pytest.approx(found.experts.mean(), rel=0.05)
        assert found.agreement == pytest.approx(chance_agreement(found.wins[None]), abs=0.02)

    def test_by_hand(self):
        # two experts, three draws, one element: expert 0 wins twice, expert 1 on the last draw
        errors = torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 1.0]]).view(2, 3, 1, 1, 1)
        found = routes(errors)
        # draws 0 and 1: the others are a win each, a tie, which goes to the first; draw 2: both others chose 0
        assert found.routed == pytest.approx((1 + 1 + 9) / 3)
        assert found.element_oracle == pytest.approx(1)
        assert found.mean == pytest.approx((1.5**2 + 1.5**2 + 2**2) / 3)
        assert found.agreement == pytest.approx(1 / 3)
        assert list(found.wins) == pytest.approx([2 / 3, 1 / 3])
        assert chance_agreement(found.wins[None]) == pytest.approx(5 / 9)

    def test_one_winner_for_all_channels_of_a_place(self):
        errors = torch.tensor([[3.0, 1.0], [0.0, 2.0]]).view(2, 1, 2, 1, 1).expand(-1, 3, -1, -1, -1)
        found = routes(errors)
        assert found.routed == pytest.approx((0 + 1) / 2)
        assert found.routed_pixels == pytest.approx((0 + 4) / 2)

    def test_one_draw_leaves_nothing_to_learn_from(self):
        with pytest.raises(ValueError, match="at least two draws of noise, got 1"):
            routes(noise(2, 1, 3, 4, 4))


@dataclasses.dataclass
class Kept:
    """Answers as a store gives them."""

    all_errors: torch.Tensor

    @property
    def shape(self):
        return tuple(self.all_errors.shape)

    def errors(self, image):
        return self.all_errors[image]


def comparison(*errors):
    return ExpertComparison(tuple("abcdef"[: len(errors)]), [Kept(part) for part in errors])


@pytest.fixture(scope="module")
def halves():
    """Three experts: two right on a half each, one right nowhere. (M, BANDS, D, C, h, w)"""
    errors = [noise(6, 4, 4, 2, 4, 4, seed=seed) for seed in range(3)]
    errors[0][..., :2] *= 0.05
    errors[1][..., 2:] *= 0.1
    return comparison(errors[2], errors[0], errors[1])


class TestComparison:
    def test_the_order_of_experts_changes_nothing(self, halves):
        other = ExpertComparison(("b", "c", "a"), [halves.stores[1], halves.stores[2], halves.stores[0]])
        assert other.best == halves.best == "b"
        assert np.array_equal(other.values("routed"), halves.values("routed"))
        assert np.allclose(other.wins()[2], halves.wins()[0])

    def test_the_best_pair_is_the_one_whose_members_complete_each_other(self, halves):
        assert sorted(halves.greedy()[1]) == [1, 2]
        assert sorted(halves.best_of_size(2)) == [1, 2]
        assert halves.routed([1]).mean() == halves.losses[1].mean()

    def test_gains_are_over_the_best_expert_and_an_interval_holds_them(self, halves):
        overall, bands = halves.gains(halves.routed(range(3)))
        assert 0.9 < overall.low < overall.value < overall.high < 1
        assert len(bands) == 4
        assert overall.n == 6
        assert halves.gains(halves.losses[1])[0].value == 0

    def test_predictions_of_one_expert_are_not_apart(self, halves):
        assert halves.apart(1, 1) == [0, 0, 0, 0]
        independent = comparison(noise(4, 4, 4, 2, 8, 8), noise(4, 4, 4, 2, 8, 8, seed=1))
        assert independent.apart(0, 1) == pytest.approx([2**0.5] * 4, rel=0.05)


def test_a_gain_is_over_whoever_is_best_in_a_resample():
    rng = np.random.default_rng(0)
    others = 1 + rng.normal(size=(2, 50)) * 0.2
    found = gain(others[0], others)
    assert found.high <= 1e-12  # an expert never gains over itself or better ones
    assert gain(others.min(0), others).low > 0
    with pytest.raises(ValueError, match="paired values"):
        gain(others[0, :4], others)


class TestProbes:
    probes = Probes(torch.zeros(8, 4, 6, 6), ["x"] * 8, torch.zeros(8, 6), draws=3, seed=0)

    def test_an_images_noise_does_not_depend_on_how_many_there_are(self):
        fewer = dataclasses.replace(self.probes, latents=torch.zeros(3, 4, 6, 6), captions=["x"] * 3)
        assert torch.equal(fewer.noise(2), self.probes.noise(2))
        assert self.probes.noise(2).shape == (4, 3, 4, 6, 6)

    def test_draws_and_images_are_apart(self):
        assert not torch.equal(self.probes.noise(0), self.probes.noise(1))
        assert not torch.equal(self.probes.noise(0)[0, 0], self.probes.noise(0)[0, 1])
        assert not torch.equal(self.probes.noise(0), dataclasses.replace(self.probes, seed=1).noise(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a copy of it, the same in half precision, and an expert that is tuned from it."""
    place = tmp_path_factory.mktemp("folders")
    base = sd_pipeline(0)
    base.save_pretrained(place / "base")
    base.save_pretrained(place / "copy")
    tuned = sd_pipeline(0)
    with torch.no_grad():
        for parameter in tuned.unet.mid_block.parameters():
            parameter.mul_(1.5)
    tuned.save_pretrained(place / "tuned")
    sd_pipeline(0).to(torch.float16).save_pretrained(place / "half")
    return place


class TestDistances:
    def found(self, folders, *names, base=None):
        *sources, reference = [name and open_source(ExpertSpec.parse(str(folders / name))) for name in (*names, base)]
        return distances(sources, reference)

    def test_a_copy_is_no_distance_away_and_half_precision_is_rounding(self, folders):
        found = self.found(folders, "copy", "base", "half")
        assert found.between(0, 1) == 0
        assert 0 < found.between(0, 2) < SAME

    def test_only_the_stage_that_was_tuned_is_away_by_as_much_as_it_was(self, folders):
        found = self.found(folders, "base", "tuned")
        apart = {stage: found.between(0, 1, stage) for stage in found.stages}
        assert [stage for stage, value in apart.items() if value] == ["M00"]
        assert apart["M00"] == pytest.approx(0.5 / ((1 + 1.5**2) / 2) ** 0.5, rel=1e-3)

    def test_the_base_under_another_name_has_cosine_one(self, folders):
        found = self.found(folders, "copy", "tuned", base="base")
        assert found.cosine_to_base(0) == pytest.approx(1, abs=1e-9)
        assert found.from_base(0) == 0
        assert found.cosine_to_base(1) < 0.999
        assert found.cosine_of_changes(0, 1) is None  # the copy changed nothing

    def test_what_two_changed_alike_has_cosine_one(self, folders):
        found = self.found(folders, "tuned", "tuned", base="base")
        assert found.cosine_of_changes(0, 1) == pytest.approx(1)


def test_features_that_have_nothing_in_common_are_root_two_apart():
    rng = np.random.default_rng(0)
    one, other = ({"M00": rng.normal(size=(40, 16, 16)).astype(np.float32)} for _ in range(2))
    assert features_apart(one, one) == {"M00": 0}
    assert features_apart(one, other)["M00"] == pytest.approx(2**0.5, rel=0.02)


class TestForetelling:
    def test_a_proportional_gain_is_found_exactly(self):
        fit = Fit.of([0.1, 0.2, 0.4], [0.05, 0.1, 0.2])
        assert fit(0.3) == Forecast(pytest.approx(0.15), pytest.approx(0.15), pytest.approx(0.15), 3)
        assert fit(-0.1).value == 0  # less than nothing is not learnt

    def test_the_interval_is_as_wide_as_sets_are_off_when_the_others_foretell_them(self):
        fit = Fit.of([0.1, 0.1], [0.0, 0.1])
        assert fit.slope == pytest.approx(0.5)
        assert fit.spread == pytest.approx(0.1)

    def test_a_gain_over_something_better_than_the_best_expert_is_less(self):
        assert over(Forecast(0.2, 0.1, 0.3, 5), 0.0).value == pytest.approx(0.2)
        assert over(Forecast(0.2, 0.1, 0.3, 5), 0.2).value == pytest.approx(0)

    def test_the_calibration_rests_on_sets_of_both_worlds_and_more_head_room_is_more_gain(self):
        sets = json.loads(CALIBRATION.read_text())["sets"]
        assert len(sets) >= 30 and {one["world"] for one in sets} == {"far", "near"}
        for helps in (False, True):
            assert set(fits(helps)) == {"afa", "router"} and fits(helps)["afa"].slope > 0

    def test_where_averaging_helps_the_forecast_is_its_gain_and_little_more(self):
        """In the near world, head-room that averaging leaves is hardly learnt."""
        alone, beside = forecast("afa", 0.1, about(-0.1)), forecast("afa", 0.1, about(0.02))
        assert alone == fits(False)["afa"](0.1) == forecast("afa", 0.1, None)
        assert beside.value == pytest.approx(0.02 + fits(True)["afa"](0.08).value) and beside.sets < alone.sets
        assert beside.value < alone.value / 2 and beside.low < beside.value < beside.high
        assert forecast("afa", 0.01, about(0.02)).value == pytest.approx(0.02)  # no head-room beyond the average

    def test_each_world_is_forecast_within_the_interval(self):
        sets = json.loads(CALIBRATION.read_text())["sets"]
        for world in ("far", "near"):
            ours = [one for one in sets if one["world"] == world]
            found = [forecast("afa", one["head_room"], about(one["average"], 1e-6) if one["averaging_helps"] else None) for one in ours]
            inside = [expected.low <= one["afa"] <= expected.high for one, expected in zip(ours, found, strict=True)]
            assert np.mean(inside) >= 0.9


def about(value, width=0.005):
    return Estimate(value, value - width, value + width, 64)


GOOD = Evidence(
    names=("a", "b", "c"),
    best="a",
    same={},
    base=(),
    lost={"a": about(0.5), "b": about(0.1), "c": about(0.04)},
    room=about(0.2),
    afa=Forecast(0.15, 0.1, 0.2, 12),
    average=about(-0.1),
    order=("a", "b", "c"),
    enough=3,
)


class TestVerdict:
    def test_experts_that_complete_each_other_are_ensembled(self):
        found = judge(GOOD)
        assert found.action == ENSEMBLE
        assert found.headline == "Yes: combining a, b and c should pay."
        assert "raises it by 10.0 % [9.5, 10.5] (n = 64)" in found.reasons[-1]

    def test_the_answer_is_yes_only_where_every_interval_says_so(self):
        assert judge(GOOD).sure
        for changed in (
            {"afa": Forecast(0.15, 0.009, 0.29, 12)},  # may gain less than it is worth
            {"average": about(0.1)},  # merging may gain as much
            {"average": None},  # nobody knows what merging gains
            {"room": Estimate(0.2, 0.1, 0.3, 5)},  # too few images for any claim
            {"room": Estimate(0.2, -0.01, 0.4, 64)},
        ):
            found = judge(dataclasses.replace(GOOD, **changed))
            assert found.action == ENSEMBLE and not found.sure and found.headline.startswith("Undecided: "), changed
        one = dataclasses.replace(GOOD, afa=Forecast(0.002, 0, 0.009, 12), average=about(-0.1), enough=1)
        assert judge(one).headline == "No: use a alone."

    def test_an_expert_is_dropped_only_where_its_interval_ends_below_what_is_worth_it(self):
        for lost, doubted in ((Estimate(0.005, 0, 0.0099, 64), ()), (Estimate(0.005, 0, 0.01, 64), ("c",))):
            found = judge(dataclasses.replace(GOOD, lost=GOOD.lost | {"c": lost}, enough=2))
            assert found.doubted == doubted and ("drop c" in found.headline) == (not doubted)

    def test_a_duplicate_is_dropped_with_the_reason(self):
        found = judge(dataclasses.replace(GOOD, same={"c": "b"}, enough=2))
        assert found.headline == "Yes: combining a and b should pay; drop c."
        assert found.dropped == {"c": "it is b but for rounding"}

    def test_an_expert_that_adds_less_than_it_is_worth_is_dropped(self):
        found = judge(dataclasses.replace(GOOD, lost=GOOD.lost | {"c": about(0.002)}, enough=2))
        assert found.experts == ("a", "b")
        assert "without it the routed loss changes by +0.2 %" in found.dropped["c"]

    def test_a_near_duplicate_is_called_one(self):
        near = dataclasses.replace(GOOD, lost=GOOD.lost | {"c": about(0.002)}, enough=2, near={"c": ("b", 0.04)})
        assert judge(near).dropped["c"].startswith("it is a near-duplicate of b (predictions 0.04 of their errors apart), and without it")

    def test_where_an_average_gains_as_much_merging_will_do(self):
        assert judge(dataclasses.replace(GOOD, average=about(0.16))).action == MERGE
        assert judge(dataclasses.replace(GOOD, average=about(0.05))).action == ENSEMBLE

    def test_without_the_average_it_is_said_that_the_forecast_may_be_too_high(self):
        found = judge(dataclasses.replace(GOOD, average=None))
        assert found.action == ENSEMBLE and "average was not measured" in found.reasons[-1] and "too high: 15 %" in found.reasons[-1]

    def test_near_experts_whose_errors_are_independent_are_merged(self):
        """A set of near experts, each winning a third of all places: AFA lowered the loss by 6.0 %, and drew worse than the merge."""
        room, average = Estimate(0.077, 0.067, 0.083, 64), about(0.0197)
        found = judge(dataclasses.replace(GOOD, room=room, average=average, afa=forecast("afa", room.value, average)))
        assert found.headline.startswith("Merge a, b and c, at the price of one model; whether an ensemble adds 1 % is undecided")

    def test_without_head_room_one_is_enough_unless_the_average_helps(self):
        poor = dataclasses.replace(GOOD, room=about(0.003), afa=Forecast(0.002, 0, 0.01, 12), enough=1)
        assert judge(dataclasses.replace(poor, average=about(-0.01))).headline == "Use a alone; whether combining gains 1 % is undecided; drop b and c."
        assert judge(dataclasses.replace(poor, average=about(0.02))).action == MERGE
        assert judge(dataclasses.replace(poor, average=None)).action == ONE

    def test_copies_are_never_merged_with_each_other(self):
        copies = dataclasses.replace(GOOD, names=("a", "b"), same={"b": "a"}, order=("a", "b"), enough=1, room=about(0, 0), afa=Forecast(0, 0, 0, 12))
        found = judge(dataclasses.replace(copies, average=about(0.02)))
        assert (found.action, found.experts) == (ONE, ("a",))

    def test_the_base_under_another_name_is_named(self):
        found = judge(dataclasses.replace(GOOD, base=("c",), enough=2))
        assert "base model under another name" in found.dropped["c"]
        kept = judge(dataclasses.replace(GOOD, base=("c",)))
        assert "c is the base model under another name; it is kept" in " ".join(kept.reasons)
