"""A LoRA of the difference of two checkpoints: the nearest of its rank, in both forms, as diffusers and this package read them."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from merging_models import flux, saved, sd, sd3, sdxl
from safetensors import safe_open
from safetensors.torch import load_file
from test_distill import drawn
from tiny import SDXL_SMALL
from tiny_transformers import FLUX_SMALL, SD3_SMALL

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.distillation.extract import KEY, extract, nearest, product
from afa.distillation.extract_settings import ExtractSettings
from afa.training.finetune import FILE

MAKE = {
    "sd": functools.partial(sd, sample_size=8),
    "sdxl": functools.partial(sdxl, **SDXL_SMALL, sample_size=8),
    "sd3": functools.partial(sd3, **SD3_SMALL),
    "flux": functools.partial(flux, **FLUX_SMALL),
}
KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (tuned, base): what a LoRA can hold differs in the denoiser and its first text encoder, the rest is the same."""
    home, made = tmp_path_factory.mktemp("pairs"), {}

    def pair(family):
        if family not in made:
            base = MAKE[family](0)
            saved(base, home / f"{family}-base")
            torch.manual_seed(1)
            for part in (getattr(base, "unet", None) or base.transformer, base.text_encoder):
                for name, module in part.named_modules():
                    if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and (part is not base.text_encoder or "encoder.layers" in name):
                        module.weight.data += 0.05 * torch.randn_like(module.weight)
            saved(base, home / f"{family}-tuned")
            made[family] = home / f"{family}-tuned", home / f"{family}-base"
        return made[family]

    return pair


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 4, 3, 3), (4, 7, 1, 1)])
def test_the_factors_are_the_nearest_of_their_rank(shape):
    delta = torch.randn(shape)
    values = torch.linalg.svdvals(delta.flatten(1).double())
    for rank in (1, 3, 1000):
        pair = nearest(delta, rank)
        left = (delta - product(pair)).double().square().sum()
        assert left == pytest.approx(values[rank:].square().sum().item(), rel=1e-3, abs=1e-6)
        assert pair[0].shape[0] == pair[1].shape[1] == min(rank, len(values))
        assert pair[0].norm() == pytest.approx(pair[1].norm().item(), rel=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_at_full_rank_the_base_with_the_lora_is_the_tuned_model(family, pairs, tmp_path):
    tuned, base = pairs(family)
    expected = drawn(tuned, kind=KINDS[family])
    assert np.abs(drawn(base, kind=KINDS[family]).astype(int) - expected).mean() > 5
    for output in (tmp_path / "lora.safetensors", tmp_path / "folder"):
        found = extract(ExtractSettings(tuned=str(tuned), base=str(base), rank=4096, output=str(output), dtype="float32"))
        assert found["share_of_the_difference"] == pytest.approx(1, abs=1e-4)
        file = output if output.is_file() else output / FILE
        ours = Ensemble.from_experts([f"a={base}+{file}"], aggregator="mean", placement="out").pipeline()
        stock = KINDS[family].from_pretrained(base)
        stock.load_lora_weights(str(file))
        for pipe in (ours, stock):
            assert np.abs(drawn(pipe).astype(int) - expected).mean() < 0.5


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_too(family, pairs, tmp_path):
    tuned, base = pairs(family)
    for output in (tmp_path / "lora.safetensors", tmp_path / "folder"):
        extract(ExtractSettings(tuned=str(tuned), base=str(base), rank=4096, output=str(output), dtype="float32"))
        file = output if output.is_file() else output / FILE
        one, other = (
            Ensemble.from_experts([place], aggregator="mean", placement="out").experts[0].model.state_dict() for place in (f"a={base}+{file}", str(tuned))
        )
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


def test_a_lower_rank_keeps_less_and_says_how_much(pairs, tmp_path):
    tuned, base = pairs("sd")
    shares = []
    for rank in (1, 2, 8):
        output = tmp_path / f"{rank}.safetensors"
        found = extract(ExtractSettings(tuned=str(tuned), base=str(base), rank=rank, output=str(output)))
        shares.append(found["share_of_the_difference"])
        with safe_open(output, framework="pt") as file:
            assert f"{shares[-1]:.4f}" in file.metadata()[KEY]
            assert file.metadata()["ss_network_dim"] == str(rank)
        assert {tensor.dtype for tensor in load_file(output).values()} == {torch.float16}
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


def test_what_a_lora_cannot_hold_is_counted_as_lost(pairs, tmp_path):
    _, base = pairs("sd")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    layer = pipe.unet.down_blocks[0].resnets[0]
    layer.conv1.weight.data += 1
    layer.conv1.bias.data += 3
    tuned = saved(pipe, tmp_path / "biased")
    found = extract(ExtractSettings(tuned=str(tuned), base=str(base), rank=1, output=str(tmp_path / "x.safetensors")))
    held, lost = layer.conv1.weight.numel(), 9 * layer.conv1.bias.numel()
    assert found["share_of_the_difference"] == pytest.approx(held / (held + lost), rel=1e-3)
    assert found["layers"] == 1


def test_text_encoders_may_be_left_out(pairs, tmp_path):
    tuned, base = pairs("sd")
    given = {"tuned": str(tuned), "base": str(base), "rank": 2}
    whole, alone = (ExtractSettings(output=str(tmp_path / f"{only}.safetensors"), denoiser_only=only, **given) for only in (False, True))
    extract(whole), extract(alone)
    assert {name for name in load_file(whole.output) if name.startswith("lora_te_text_model_")}
    assert {name.split("_")[1] for name in load_file(alone.output)} == {"unet"}


def test_single_files_and_folders_may_be_mixed(pairs, tmp_path):
    from afa.merging.engine import merge_files
    from afa.merging.settings import MergeSettings

    tuned, base = pairs("sd")
    merge_files(MergeSettings(experts=[str(tuned)], output=str(tmp_path / "tuned.safetensors")))
    places = {"a": tuned, "b": tmp_path / "tuned.safetensors"}
    one, other = (ExtractSettings(tuned=str(place), base=str(base), rank=2, output=str(tmp_path / f"{name}.safetensors")) for name, place in places.items())
    extract(one), extract(other)
    mine, theirs = load_file(one.output), load_file(other.output)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("rank", "words"), [("0", "too small"), ("-1", "too small")])
def test_bad_ranks_get_a_sentence(rank, words, pairs, tmp_path, capsys):
    tuned, base = pairs("sd")
    assert main(["extract", str(tuned), "--base", str(base), "--rank", rank, "--output", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err


def test_what_does_not_fit_or_does_not_differ_is_refused(pairs, tmp_path):
    tuned, base = pairs("sd")
    given = {"base": str(base), "output": str(tmp_path / "x.safetensors")}
    with pytest.raises(UserError, match="differ in no layer"):
        extract(ExtractSettings(tuned=str(base), **given))
    with pytest.raises(UserError, match="cannot join"):
        extract(ExtractSettings(tuned=str(pairs("sdxl")[0]), **given))
    assert not (tmp_path / "x.safetensors").exists()
    Path(given["output"]).write_text("")
    with pytest.raises(UserError, match="exists already"):
        extract(ExtractSettings(tuned=str(tuned), **given))


def test_the_command_says_what_is_kept(pairs, tmp_path, capsys):
    tuned, base = pairs("sd")
    words = ["extract", str(tuned), "--base", str(base), "--rank", "2", "--output", str(tmp_path / "x.safetensors")]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 2
    assert not (tmp_path / "x.safetensors").exists()
    assert main(words) == 0
    assert "of the squared difference" in capsys.readouterr().out
