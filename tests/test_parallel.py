"""Experts on several devices: three processes draw what one process draws, and each holds one expert."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from tiny import sd_pipeline
from tiny_transformers import sd3_pipeline

from afa import Ensemble, UserError
from afa.aggregators.registry import count_parameters
from afa.cli.main import main
from afa.denoiser.hooks import only_expert
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings

SMALL = {"hidden": 8, "heads": 2, "depth": 1}


def saved(folder, make=sd_pipeline, **options):
    """An ensemble of three experts, as if it were trained."""
    for seed in range(3):
        pipe = make(seed, text_seed=0) if make is sd3_pipeline else make(seed)
        pipe.save_pretrained(folder / f"expert{seed}")
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
        (sd_pipeline, {"aggregator": "stitch", **SMALL}),
        (sd_pipeline, {"aggregator": "sabw", "placement": "blocks", **SMALL}),
        (sd3_pipeline, {"aggregator": "sabw", "text_stream": "fused", **SMALL}),
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
        exact = ensemble.denoiser(**call).sample
    channels = {stage.name: stage.channels * (8 // 2**stage.level) ** 2 for stage in ensemble.denoiser.stages}

    def work():
        from accelerate import PartialState

        PartialState(cpu=True)
        denoiser = ensemble.denoiser
        denoiser.share_experts()
        with torch.no_grad():
            found = denoiser(**call).sample
        with pytest.raises(NotImplementedError, match="one expert alone"), only_expert(denoiser, "expert0"), torch.no_grad():
            denoiser(**call)
        return count_parameters(denoiser.experts), torch.equal(found, exact), denoiser.group.sent

    held, same, sent = zip(*in_processes(work, count=3), strict=True)
    assert set(held) == {whole // 3} and all(same) and len(set(sent)) == 1
    assert sent[0] > 2 * 2 * 4 * channels["IN00"]


def test_experts_that_processes_cannot_share_are_refused(tmp_path):
    settings = GenerateSettings(
        sources=[str(saved(tmp_path, **SMALL))], output=str(tmp_path / "out"), prompt=["a cat"], parallel="experts", device="cpu"
    )

    def refused():
        try:
            generate(settings)
        except UserError as error:
            return str(error)

    with pytest.raises(UserError, match="--parallel experts needs several processes, such as: torchrun --nproc_per_node 3"):
        generate(settings)
    assert all("3 experts cannot be shared evenly by 2 processes; start 3" in said for said in in_processes(refused, count=2))
    for changes in ({"lead": "expert0", "reuse": 2}, {"method": "magicfusion"}, {"expert": "expert0"}, {"store": "int8"}, {"compile": True}):
        with pytest.raises(UserError, match="--parallel experts is for whole ensembles as they are"):
            replace(settings, **changes)
