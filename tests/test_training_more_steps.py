"""Laws of more steps for a finished run: it goes on from its last state, to the bits of a run of as many steps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import aggregators, experts, images, interrupt_after, settings, trained  # noqa: F401 (fixtures)

from afa import Ensemble, UserError
from afa.training.log import LOG
from afa.training.run import finished, train

SAME = ("history", "steps", "best_step", "held_out_loss", "difference_to_untrained", "difference_to_best_expert", "weights_moved")


def lines(settings):  # noqa: F811
    found = [json.loads(line) for line in (Path(settings.output) / LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("images_per_second", "memory_gb")} for line in found]


def test_two_steps_and_then_six_are_six_at_once(settings, trained, monkeypatch):  # noqa: F811
    """Also when the second part is interrupted; meanwhile the folder holds the ensemble of two steps."""
    whole, expected = trained
    assert train(replace(settings, steps=2))["steps"] == 2
    before = aggregators(settings)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="after step 3"):
            train(settings)
    assert all(torch.equal(value, before[name]) for name, value in aggregators(settings).items())
    assert Ensemble.load(settings.output).training["steps"] == 2
    found = train(settings)
    assert {name: found[name] for name in SAME} == {name: expected[name] for name in SAME}
    bits = aggregators(whole)
    assert all(torch.equal(value, bits[name]) for name, value in aggregators(settings).items())
    assert lines(settings) == lines(whole)
    assert train(replace(settings, steps=None)) == found  # the same command without --steps: nothing to do


def test_fewer_steps_than_were_made_are_refused(trained):  # noqa: F811
    with pytest.raises(UserError, match=r"finished with --steps 6 \(now 4\); choose another --output"):
        finished(replace(trained[0], steps=4))


def test_more_steps_with_other_options_are_refused_by_name(trained, tmp_path):  # noqa: F811
    copied = replace(trained[0], output=str(shutil.copytree(trained[0].output, tmp_path / "out")))
    with pytest.raises(UserError, match=r"--lr 0.01 \(now 0.5\)"):
        train(replace(copied, steps=9, lr=0.5))


def test_more_steps_are_refused_with_a_way_out_where_the_run_cannot_go_on(settings, tmp_path):  # noqa: F811
    falling = replace(settings, schedule="cosine", steps=2, output=str(tmp_path / "falling"))
    train(falling)
    with pytest.raises(UserError, match="--schedule cosine has taken its rate to 0; train it further with --start"):
        train(replace(falling, steps=4))
    train(replace(settings, steps=2))
    (Path(settings.output) / ".training" / "last.pt").unlink()
    with pytest.raises(UserError, match="its last state .*last.pt is not there; train it further with --start"):
        train(replace(settings, steps=4))


def test_a_run_that_stopped_by_itself_goes_on_with_more_patience(settings):  # noqa: F811
    still = replace(settings, steps=20, lr=0.0, patience=1)
    assert train(still)["steps"] == 2
    with pytest.raises(UserError, match=r"has not fallen since step 0 of 2; raise --patience \(now 1\)"):
        train(replace(still, steps=30))
    assert train(replace(still, steps=30, patience=2))["steps"] == 4


def test_what_is_kept_is_not_kept_for_what_a_comparison_trains(settings):  # noqa: F811
    train(replace(settings, steps=2), keep=False)
    assert not (Path(settings.output) / ".training").exists()
