"""Experts on several devices: three processes draw what one process draws, and each holds one expert."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from test_training import aggregators, experts, images, settings  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import SD3_SMALL, sd3_pipeline

from afa import Ensemble, UserError
from afa.aggregators.registry import count_parameters
from afa.cli.main import main
from afa.denoiser.hooks import only_expert
from afa.experts.quantised import kept_tensors, stored_bytes
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.training.run import plan, train
from afa.training.state import kept_file

SMALL = {"hidden": 8, "heads": 2, "depth": 1}


ONE = functools.partial(sd_pipeline, **ONE_LEVEL)
SD3 = functools.partial(sd3_pipeline, text_seed=0, **SD3_SMALL)


def saved(folder, make=ONE, **options):
    """An ensemble of three experts, as if it were trained."""
    for seed in range(3):
        make(seed).save_pretrained(folder / f"expert{seed}")
    ensemble = Ensemble.from_experts([str(folder / f"expert{seed}") for seed in range(3)], **options)
    torch.manual_seed(0)
    for aggregator in ensemble.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight)
    ensemble.save(folder / "ensemble")
    return folder / "ensemble"


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ONE, {"aggregator": "stitch", **SMALL}),
        (sd_pipeline, {"aggregator": "sabw", "placement": "blocks", **SMALL}),
        (SD3, {"aggregator": "sabw", "text_stream": "fused", **SMALL}),
    ],
    ids=["stitch", "blocks", "text tokens"],
)
def test_three_processes_draw_what_one_draws(make, options, tmp_path, capfd):
    ensemble = saved(tmp_path, make, **options)
    small = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu"}
    alone = generate(GenerateSettings(sources=[str(ensemble)], output=str(tmp_path / "one"), prompt=["a cat", "a dog"], **small))
    flags = {f"--{name}": value for name, value in small.items()} | {"--output": tmp_path / "three", "--parallel": "experts", "--batch-size": 2}
    command = ["generate", str(ensemble), "--prompt", "a cat", "a dog", *(str(part) for flag in flags.items() for part in flag)]
    capfd.readouterr()
    assert in_processes(lambda: main(command), count=3) == [0, 0, 0]
    out, error = capfd.readouterr()
    assert out == f"2 images in {tmp_path / 'three'}\n" and error.count("afa: 3 processes; each got ") == 1
    for path in alone:
        assert np.abs(pixels(path) - pixels(tmp_path / "three" / path.name)).max() <= 1


def test_each_process_holds_one_expert_and_gets_the_features_of_the_others(tmp_path):
    ensemble = Ensemble.load(saved(tmp_path, aggregator="sabw", **SMALL))
    whole = count_parameters(ensemble.denoiser.experts)
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500), "encoder_hidden_states": torch.randn(2, 7, 24)}
    with torch.no_grad():
        exact, alone = ensemble.denoiser(**call).sample, {}
        for name in ensemble.names:
            with only_expert(ensemble.denoiser, name):
                alone[name] = ensemble.denoiser(**call).sample
    channels = {stage.name: stage.channels * (8 // 2**stage.level) ** 2 for stage in ensemble.denoiser.stages}

    def work():
        from accelerate import PartialState

        PartialState(cpu=True)
        denoiser = ensemble.denoiser
        denoiser.share_experts()
        with torch.no_grad():
            found = denoiser(**call).sample
            sent = denoiser.group.sent
            for name, prediction in alone.items():
                with only_expert(denoiser, name):
                    assert torch.equal(denoiser(**call).sample, prediction)
        return count_parameters(denoiser.experts), torch.equal(found, exact), sent

    held, same, sent = zip(*in_processes(work, count=3), strict=True)
    assert set(held) == {whole // 3} and all(same) and len(set(sent)) == 1
    assert sent[0] > 2 * 2 * 4 * channels["IN00"]


def test_experts_that_processes_cannot_share_are_refused(tmp_path):
    asked = GenerateSettings(
        sources=[str(saved(tmp_path, **SMALL))], output=str(tmp_path / "out"), prompt=["a cat"], parallel="experts", device="cpu"
    )

    def refused():
        try:
            generate(asked)
        except UserError as error:
            return str(error)

    with pytest.raises(UserError, match="--parallel experts needs several processes, such as: torchrun --nproc_per_node 3"):
        generate(asked)
    assert all("3 experts cannot be shared evenly by 2 processes; start 3" in said for said in in_processes(refused, count=2))
    for changes in ({"lead": "expert0", "reuse": 2}, {"method": "magicfusion"}, {"expert": "expert0"}, {"store": "int8"}, {"compile": True}):
        with pytest.raises(UserError, match="--parallel experts is for whole ensembles as they are"):
            replace(asked, **changes)


def last(options):
    """The aggregators after the last step of a training, which is run if it was not."""
    train(options)
    return torch.load(kept_file(options), weights_only=True)["aggregators"]


@pytest.mark.parametrize(
    "options",
    [{"aggregator": "stitch"}, {"aggregator": "sabw", "gradient_checkpointing": True}, {"aggregator": "sabw", "placement": "blocks", "accumulate": 2}],
    ids=["stitch", "checkpointed", "accumulated"],
)
def test_processes_that_share_the_experts_train_what_one_process_trains(settings, tmp_path, options):  # noqa: F811
    """Not to the bit: sums of gradients are rounded in another order."""
    one = replace(settings, **{**options, "output": str(tmp_path / "one"), "lr": 2e-4, "steps": 2})
    shared = replace(one, parallel="experts", output=str(tmp_path / "shared"))
    record = train(one)
    records = in_processes(lambda: train(shared))
    assert [found["history"] for found in records] == [records[0]["history"]] * 2
    for mine, other in zip(record["history"], records[0]["history"], strict=True):
        assert mine["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-5)
    assert records[0]["held_out_loss"].keys() == record["held_out_loss"].keys()
    trained, other, before = last(one), last(shared), last(replace(one, lr=1e-12, steps=1, output=str(tmp_path / "still")))
    moved = max((tensor - before[name]).abs().max() for name, tensor in trained.items())
    apart = max((tensor - other[name]).abs().max() for name, tensor in trained.items())
    assert moved > 0 and apart < 0.02 * moved


def test_experts_in_parts_on_all_processes_train_as_whole_ones(settings, tmp_path):  # noqa: F811
    whole = replace(settings, output=str(tmp_path / "whole"), lr=1e-3, steps=2, gradient_checkpointing=True)
    parts = replace(whole, output=str(tmp_path / "parts"), store="sharded")

    def trained(options):
        planned = plan(options)
        frozen = planned.ensemble.denoiser.experts
        held, divided = stored_bytes(frozen), sum(tensor.nbytes for tensor in kept_tensors(frozen))
        train(options, planned)
        return held, divided

    ((all_of_it, _), _), found = in_processes(lambda: trained(whole)), in_processes(lambda: trained(parts))
    for held, divided in found:  # of the layers that are large enough
        assert 0 < divided == all_of_it - held
    for mine, theirs in zip(aggregators(whole).values(), aggregators(parts).values(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)  # stored layers round their gradients otherwise
    with pytest.raises(UserError, match="--store sharded needs several processes on a machine, such as: torchrun"):
        train(replace(parts, output=str(tmp_path / "alone")))
    with pytest.raises(UserError, match="--sheet-every 2 draws in one process"):
        replace(parts, sheet_every=2)


def test_a_shared_training_goes_on_in_one_process(settings, tmp_path):  # noqa: F811
    whole = replace(settings, output=str(tmp_path / "whole"), steps=2, lr=1e-3)
    half = replace(whole, output=str(tmp_path / "half"), steps=1)
    train(whole)
    in_processes(lambda: train(replace(half, parallel="experts")))
    train(replace(half, steps=2))
    for mine, other in zip(aggregators(whole).values(), aggregators(half).values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("changes", [{"store": "int8"}, {"sheet_every": 2}])
def test_what_cannot_be_trained_by_several_processes_is_refused(settings, changes):  # noqa: F811
    with pytest.raises(UserError, match="--parallel experts"):
        replace(settings, parallel="experts", **changes)
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node 2 -m afa train"):
        train(replace(settings, parallel="experts"))


def test_of_several_processes_the_first_one_prints_the_result(settings, tmp_path, capfd):  # noqa: F811
    command = ["train", "--experts", *settings.experts, "--data", settings.data, "--output", str(tmp_path / "out"), "--parallel", "experts"]
    sizes = ["--hidden", "8", "--heads", "2", "--batch-size", "2", "--steps", "2", "--evaluate-every", "2", "--resolution", "32"]
    capfd.readouterr()
    assert in_processes(lambda: main([*command, *sizes])) == [0, 0]
    assert capfd.readouterr().out.count("held-out loss") == 1
