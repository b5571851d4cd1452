"""The plan's memory is what a step then needs, counted tensor by tensor."""

from dataclasses import replace

import pytest
import torch
from test_training import experts, images, settings  # noqa: F401 (fixtures)

from afa.cli.main import main
from afa.memory import LiveBytes
from afa.training.loop import Trainer
from afa.training.run import plan, train


def measured(settings, monkeypatch):  # noqa: F811
    """The most bytes alive in the second step of a real run, with all that the loop holds."""
    found, original = [], Trainer._step

    def step(self):
        with LiveBytes() as counter:
            for parameter in self.denoiser.parameters():
                parameter.view(-1)  # seen, though a stage may not be run
            for tensor in [*self.average.shadow_params, *self.best]:
                tensor.view(-1)
            result = original(self)
        found.append(counter.peak)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        train(settings)
    return found[-1]


@pytest.mark.parametrize(
    "changes", [{}, {"placement": "out"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"batch_size": 6, "depth": 2}]
)
def test_a_step_needs_what_the_plan_says(settings, monkeypatch, changes):  # noqa: F811
    run = replace(settings, steps=2, **changes)
    planned = plan(run)
    before = planned.memory()["expected_memory_gb"]
    from afa.training.estimate import expected

    encoders = list(planned.ensemble.text_encoders)  # a step touches them, not the VAE
    found = expected(planned.ensemble.denoiser, encoders, run.batch_size, 4, getattr(torch, run.dtype), run.gradient_checkpointing)
    assert found.total == pytest.approx(measured(run, monkeypatch), rel=0.15)
    assert before >= 0


def test_less_memory_is_proposed_until_everything_is_on(settings):  # noqa: F811
    ways = plan(settings).memory()["for_less_memory"]
    assert [way.split()[0] for way in ways][-3:] == ["--dtype", "--cache", "--batch-size"]
    low = replace(settings, dtype="bfloat16", cache="somewhere", batch_size=1, gradient_checkpointing=True)
    assert plan(low).memory()["for_less_memory"] == []


def test_a_dry_run_says_the_memory(settings, capsys):  # noqa: F811
    small = ["--hidden", "8", "--heads", "2", "--depth", "1", "--resolution", "32", "--batch-size", "2", "--held-out", "2", "--device", "cpu"]
    assert main(["train", "--experts", *settings.experts, "--data", settings.data, "--output", settings.output, *small, "--dry-run"]) == 0
    assert "GB of tensors in a step" in capsys.readouterr().out
