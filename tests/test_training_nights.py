"""What must not cost a night: numbers that are none, a kill at any moment, an expert nobody uses, a log nobody can read."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import in_processes, killed
from test_training import aggregators, experts, images, interrupt_after, settings, trained  # noqa: F401 (fixtures)

from afa.errors import UserError
from afa.experts.load import load_expert
from afa.training.log import LOG, flat
from afa.training.loop import PERSISTS
from afa.training.measure import BANDS, Routing, RoutingSums, bands_of, group_of
from afa.training.objectives import Mse
from afa.training.run import train

# --- numbers that are none --------------------------------------------------------------------------------------------


def spoil(monkeypatch, steps):
    """Make the loss of some steps (counted from 1) no number."""
    original, counted = Mse.loss, [0]

    def loss(self, work):
        found = original(self, work)
        if torch.is_grad_enabled():
            counted[0] += 1
            return found * float("nan") if counted[0] in steps else found
        return found

    monkeypatch.setattr(Mse, "loss", loss)


def test_a_step_that_is_no_number_is_skipped_and_counted(settings, monkeypatch):  # noqa: F811
    spoil(monkeypatch, {2, 4})
    train(settings)
    assert all(torch.isfinite(tensor).all() for tensor in aggregators(settings).values())
    lines = [json.loads(line) for line in (Path(settings.output) / LOG).read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2]
    assert all(np.isfinite(line["held_out_loss"]) for line in lines)


def test_a_skipped_step_changes_nothing_that_is_trained(settings, monkeypatch, tmp_path):  # noqa: F811
    whole = replace(settings, steps=1, evaluate_every=1, output=str(tmp_path / "whole"))
    train(whole)
    spoil(monkeypatch, {2})
    train(replace(settings, steps=2, evaluate_every=1))
    before, after = aggregators(whole), aggregators(settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_run_that_does_not_recover_stops_and_says_why(settings, monkeypatch):  # noqa: F811
    spoil(monkeypatch, set(range(3, 100)))
    sentence = f"no finite gradient for {PERSISTS} steps in a row, up to step {PERSISTS + 2}: the experts alone are fine"
    with pytest.raises(UserError, match=sentence):
        train(replace(settings, steps=50, patience=50))


def test_an_expert_that_predicts_no_numbers_is_named(settings, experts, tmp_path):  # noqa: F811
    broken = load_expert(experts[1])
    with torch.no_grad():
        broken.model.conv_out.weight.fill_(3e38)  # finite, and what it predicts is not
    broken.model.save_pretrained(tmp_path / "broken" / "unet")
    for part in Path(experts[1]).iterdir():
        if part.name != "unet":
            (tmp_path / "broken" / part.name).symlink_to(part)
    run = replace(settings, experts=[experts[0], f"bad={tmp_path / 'broken'}"], steps=PERSISTS)
    with pytest.raises(UserError, match="expert 'bad' alone already predicts what is no number"):
        train(run)


# --- killed at any moment ---------------------------------------------------------------------------------------------


def test_killed_training_equals_uninterrupted(settings, tmp_path):  # noqa: F811
    """Before a state takes its place, right after the first, and once more: the same bits in the end."""
    run = replace(settings, steps=3, save_every=1)
    whole = replace(run, output=str(tmp_path / "whole"))
    train(whole)
    renamed = []

    def state_takes_its_place(event, details):
        return event == "os.rename" and str(details[1]).endswith("state.pt")

    def state_is_there(event, details):
        renamed.extend([1] * state_takes_its_place(event, details))
        return bool(renamed) and event == "open"

    assert all(killed(lambda: train(run), ready) for ready in (state_takes_its_place, state_is_there, state_is_there))
    assert (Path(run.output) / ".training" / "state.pt").exists()
    train(run)
    expected = aggregators(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in aggregators(run).items())
    logs = [[json.loads(line) for line in (Path(each.output) / LOG).read_text().splitlines()] for each in (whole, run)]
    timeless = [[{name: value for name, value in line.items() if name not in ("images_per_second", "memory_gb")} for line in log] for log in logs]
    assert timeless[0] == timeless[1]


# --- the same step, however it is divided ------------------------------------------------------------------------------


def close(one, other):
    first, second = aggregators(one), aggregators(other)
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items()) < 1e-6


def test_two_small_batches_make_the_step_of_a_large_one(settings, tmp_path):  # noqa: F811
    """Plain gradient descent would agree to the last bits; Adam divides by gradients near zero, so a small rate is used."""
    large = replace(settings, batch_size=4, output=str(tmp_path / "large"), lr=1e-4, steps=2)
    train(large)
    train(replace(settings, batch_size=2, accumulate=2, lr=1e-4, steps=2))
    assert close(large, settings)


REWARDED = {"objective": "mse+draft", "reward": "red.py", "draft_steps": 3, "draft_last": 2, "sparsity": 0.1}


@pytest.mark.parametrize("objective", [{}, REWARDED], ids=["mse", "mse+draft"])
def test_two_processes_make_the_step_of_one_with_twice_the_batch(settings, tmp_path, objective, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("red.py").write_text("def reward(images, captions):\n    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))\n")
    large = replace(settings, batch_size=4, output=str(tmp_path / "large"), lr=1e-4, steps=2, **objective)
    train(large)
    in_processes(lambda: train(replace(settings, lr=1e-4, steps=2, **objective)))
    assert close(large, settings)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "wanted"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules_warm_up_and_fall(settings, schedule, wanted):  # noqa: F811
    run = replace(settings, schedule=schedule, warm_up=10, steps=30, lr=1e-2)
    assert [run.rate(step) for step in (0, 4, 9)] == pytest.approx([1e-3, 5e-3, 1e-2])
    assert run.rate(20) == pytest.approx(wanted * 1e-2)
    if schedule != "constant":
        assert run.rate(30) == pytest.approx(0)
    assert run.rate(15) == pytest.approx(1e-2 * {"constant": 1, "linear": 0.75, "cosine": 0.5 * (1 + math.cos(math.pi / 4))}[schedule])


def test_a_schedule_that_ends_at_the_last_step_binds_their_number(settings, monkeypatch):  # noqa: F811
    run = replace(settings, schedule="cosine", steps=3)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    with pytest.raises(UserError, match=r"was begun with --steps 3 \(now 8\)"):
        train(replace(run, steps=8))
    assert train(run)["steps"] == 3


# --- the measure -------------------------------------------------------------------------------------------------------


def test_the_held_out_measure_is_never_weighed(settings, trained):  # noqa: F811
    plain, weighed = trained[1], train(replace(settings, snr_gamma=5.0))
    assert plain["history"][0] == weighed["history"][0] and plain["history"][1:] != weighed["history"][1:]


# --- routing and the log ----------------------------------------------------------------------------------------------


def test_the_log_has_a_line_for_every_measurement(trained):  # noqa: F811
    run, record = trained
    lines = [json.loads(line) for line in (Path(run.output) / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert [line["held_out_loss"] for line in lines] == [entry["held_out_loss"] for entry in record["history"]]
    for line in lines:
        assert list(line["routing"]["weights"]) == list(line["routing"]["entropy"]) == ["IN", "M", "OUT"]
        for weights in line["routing"]["weights"].values():
            assert np.sum([weights["photo"], weights["paint"]], axis=0) == pytest.approx(np.ones(BANDS), abs=2e-4)
    first = lines[0]["routing"]
    assert np.asarray(list(first["entropy"].values())) == pytest.approx(1) and np.asarray(first["weights"]["M"]["paint"]) == pytest.approx(0.5)
    assert lines[-1]["images_per_second"] > 0 and lines[-1]["memory_gb"] > 0


def test_routing_is_the_mean_over_stages_samples_and_places():
    one, other = torch.zeros(2, 2, 1, 2), torch.full((2, 2, 4, 4), 0.5)
    one[0, 0] = one[1, 1] = 1  # the first sample is all of the first expert, the second of the second
    sums = RoutingSums(["a", "b"], ["IN00", "IN01", "OUT03"])
    sums.add({"IN00": one, "IN01": other, "OUT03": one}, np.asarray([0, 3]))
    found = sums.result()
    assert found.groups == ("IN", "OUT")
    assert found.weights[0, 0].tolist() == [0.75, 0.25] and found.weights[0, 3].tolist() == [0.25, 0.75]
    assert found.weights[1, 0].tolist() == [1, 0] and found.entropy[0, 0] == 0.5 and found.entropy[1, 3] == 0
    assert found.weights[0, 1].tolist() == [0.5, 0.5]  # no sample there: as the others


def test_an_expert_is_dropped_only_if_no_group_and_no_band_uses_it():
    weights = np.full((2, BANDS, 2), 0.5)
    weights[:, :, 1], weights[:, :, 0] = 0.01, 0.99
    assert Routing(("a", "b"), ("IN", "OUT"), weights, np.zeros((2, BANDS))).dropped == ["b"]
    weights[1, 2] = [0.9, 0.1]
    assert Routing(("a", "b"), ("IN", "OUT"), weights, np.zeros((2, BANDS))).dropped == []


def test_stages_and_timesteps_fall_into_groups():
    assert [group_of(name) for name in ("IN00", "M00", "OUT11", "block.7")] == ["IN", "M", "OUT", "block.7"]
    assert bands_of(torch.tensor([0, 249, 250, 999]), 1000).tolist() == [0, 0, 1, 3]


def test_nested_numbers_are_told_by_their_path():
    assert flat({"step": 2, "loss": {"a": [1.0, None, 3.0]}, "name": "x", "done": True}) == {"step": 2.0, "loss/a/0": 1.0, "loss/a/2": 3.0}


def test_a_tracker_gets_the_numbers(settings):  # noqa: F811
    pytest.importorskip("tensorboard")
    train(replace(settings, log_with="tensorboard", steps=2))
    assert list((Path(settings.output) / "runs").rglob("events.out.tfevents.*"))


def test_a_tracker_that_is_not_installed_is_one_sentence(settings):  # noqa: F811
    with pytest.raises(UserError, match="--log-with wandb cannot be used; install it with: pip install wandb"):
        train(replace(settings, log_with="wandb"))
