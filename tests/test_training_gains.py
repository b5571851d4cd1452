"""Laws of what a training says at its end: against the ensemble before training and the best expert, with what to try."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from test_training import experts, images, interrupt_after, settings, trained  # noqa: F401 (fixtures)

from afa.checkpoint.card import model_card
from afa.checkpoint.gains import HARDLY, gains
from afa.checkpoint.manifest import read_manifest
from afa.stats import Estimate
from afa.training.measure import HeldOut
from afa.training.run import train


def record(change, best=(-0.01, -0.012, -0.008), moved=0.1, best_step=500):
    found = [dataclasses.asdict(Estimate(*three, 64)) for three in (change, best)]
    own = {"best_expert": "a", "steps": 500, "best_step": best_step, "weights_moved": moved, "settings": {"lr": 1e-4}}
    return {**own, "difference_to_untrained": found[0], "difference_to_best_expert": found[1]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            record((-0.002, -0.003, -0.001)),
            "lower than that of the untrained ensemble: -0.00200 [-0.00300, -0.00100], and than that of its best expert, a: -0.01000 [-0.01",
        ),
        (
            record((-0.002, -0.003, -0.001)),
            "paired over the held-out images. 80 % of the gain over the best expert was there before training.",
        ),
        (record((-0.01, -0.012, -0.008)), "None of the gain over the best expert was there before training."),
        (record((-0.02, -0.03, -0.01)), "None of the gain over the best expert was there before training."),
        (
            record((-0.0001, -0.0006, 0.0004)),
            "not distinguishable from that of the untrained ensemble: -0.00010 [-0.00060, +0.00040], and lower than that of its best expert, a",
        ),
        (record((-0.0001, -0.0006, 0.0004)), "within noise; to tell so small a gain takes about 1,600 held-out images. Try more steps (--steps 1000)"),
        (record((-0.0001, -0.0006, 0.0004), best_step=200), "held-out images. Try more images; `afa screen`"),
        (record((0.0001, -0.001, 0.001)), "All of the gain over the best expert was there before training. What training gained is within noise. Try"),
        (record((0.002, 0.001, 0.003)), "Training made it worse. Try a lower --lr (now 0.0001)"),
        (record((0.0, 0.0, 0.0), best_step=0), "so the weights from before were kept. Try a lower --lr (now 0.0001); `afa screen`"),
        (record((-0.002, -0.003, -0.001), moved=0.004), "hardly moved: by 0.0040 in the mean"),
        (record((-0.002, -0.003, -0.001), moved=0.004), "Try more steps (--steps 1000) or a higher --lr (now 0.0001); `afa screen`"),
    ],
)
def test_the_closing_sentences_say_what_training_itself_gained_and_what_to_try(given, said):
    assert said in " ".join(gains(given))


def test_where_much_was_learnt_nothing_is_advised():
    assert len(gains(record((-0.002, -0.003, -0.001)))) == 2


def test_a_record_from_before_this_comparison_is_still_read():
    old = {"best_expert": "a", "steps": 9, "best_step": 9, "difference_to_best_expert": dataclasses.asdict(Estimate(-0.01, -0.02, -0.005, 64))}
    assert gains(old) == [
        "The trained ensemble's loss is lower than that of its best expert, a: -0.01000 [-0.02000, -0.00500], paired over the held-out images."
    ]
    shipped = Path(__file__).parent.parent / "afa" / "demo" / "assets" / "ensemble"
    assert "lower than that of the untrained ensemble: -0.23206" in model_card(read_manifest(shipped))


def test_a_run_that_learns_nothing_says_so_in_its_card_too(settings):  # noqa: F811
    found = train(replace(settings, lr=0.0, steps=2))
    assert found["weights_moved"] == 0 and found["best_step"] == 0
    card = (Path(settings.output) / "README.md").read_text()
    assert "have hardly moved: by 0.0000" in card and "or a higher --lr (now 0)" in card
    assert list(found["held_out_loss"]) == ["trained", "untrained", "photo", "paint"] and "| untrained |" in card


def test_weights_that_route_have_moved(settings):  # noqa: F811
    assert train(replace(settings, lr=0.05, warm_up=0, ema=0.0, steps=8))["weights_moved"] > HARDLY


def test_what_was_there_before_training_is_measured_once(settings, monkeypatch):  # noqa: F811
    counted, original = [], HeldOut.experts
    monkeypatch.setattr(HeldOut, "experts", lambda self, denoiser: counted.append(1) or original(self, denoiser))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(replace(settings, steps=2))
    assert train(replace(settings, steps=2))["steps"] == 2 and counted == [1]


def test_a_state_from_before_this_comparison_goes_on(settings, trained, monkeypatch):  # noqa: F811
    import torch

    _, whole = trained
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    file = Path(settings.output) / ".training" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["before"]
    torch.save(state, file)
    found = train(settings)
    assert all(found[name] == whole[name] for name in ("history", "held_out_loss", "difference_to_untrained", "weights_moved"))
