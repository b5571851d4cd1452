"""What `afa merge` says: of its plan, of a merged file, and of what it cannot do."""

import json

import pytest
import torch
from merging_models import afa_merge, saved, sd, settings, write_experts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afa.cli import merge
from afa.errors import UserError
from afa.experts.spec import ExpertSpec
from afa.files import sha256
from afa.merging.block_weights import PRESETS
from afa.merging.engine import merge_files, write
from afa.merging.plan import make_plan
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader, open_source


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("experts"))


def test_a_merged_file_says_how_it_was_made(home, tmp_path):
    merge_files(settings(home, tmp_path / "merged.safetensors", "a", "b.safetensors", method="ties", base=str(home / "base"), density=0.3))
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        strings = file.metadata()
    recipe = json.loads(strings["afa.merge"])
    assert strings["format"] == "pt"
    assert (recipe["method"], recipe["options"]) == ("ties", {"density": 0.3, "scale": 1.0})
    assert [expert["name"] for expert in recipe["experts"]] == ["a", "b"]
    assert recipe["experts"][1]["sha256"] == {"b.safetensors": sha256(home / "b.safetensors")}
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert recipe["base"]["sha256"][unet] == sha256(home / "base" / unet)
    assert str(home) not in strings["afa.merge"]  # a file that is passed on tells nothing of the disk it was made on


def test_the_same_merge_gives_the_same_bytes(home, tmp_path):
    for name in ("one", "two"):
        merge_files(settings(home, tmp_path / f"{name}.safetensors", "a", "b", method="dare", base=str(home / "base")))
    assert sha256(tmp_path / "one.safetensors") == sha256(tmp_path / "two.safetensors")


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_an_interrupted_merge_leaves_nothing(output, home, tmp_path):
    class DiskFullError(Exception):
        pass

    class Bar:
        count = 0

        def update(self):
            self.count += 1
            if self.count == 200:
                raise DiskFullError

    plan = make_plan(settings(home, tmp_path / output, "a", "b"))
    with Reader() as reader, pytest.raises(DiskFullError):
        write(plan, reader, {"format": "pt"}, Bar())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_size_and_writes_nothing(home, tmp_path, capsys):
    arguments = ["--experts", home / "a", home / "b", "--output", tmp_path / "merged.safetensors", "--json"]
    assert afa_merge(*arguments, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert afa_merge(*arguments) == 0
    done = json.loads(capsys.readouterr().out)
    tensors = load_file(tmp_path / "merged.safetensors").values()
    assert planned["bytes"] == done["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned["tensors"] == len(tensors)
    assert planned["options"] == {"weights": [0.5, 0.5]}


def test_the_plan_shows_equal_stages_in_one_line(home, tmp_path, capsys):
    assert afa_merge("--method", "mbw", "--experts", home / "a", home / "b", "--weights", "0,0,1,1,1,0,0,0,0.5", "--output", tmp_path / "m", "--dry-run") == 0
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("stage")]
    assert lines == ["base … IN01: 1 0", "IN02 … M00: 0 1", "OUT00 … OUT02: 1 0", "OUT03: 0.5 0.5"]


REFUSALS = [
    (["--method", "ties", "--experts", "a", "b"], "ties adds what experts learnt to their base"),
    (["--experts", "a", "b", "--weights", "1", "2", "3"], "3 weights for 2 experts"),
    (["--experts", "a", "b", "--weights", "GRAD_V"], "--weights GRAD_V are not all numbers; stages are weighted by --method mbw"),
    (["--experts", "a", "b", "--t", "0.5"], "weighted: there is no option 't'"),
    (["--experts", "a", "b", "--base", "base"], "weighted takes no base"),
    (["--experts", "a", "wide"], "'wide' cannot join 'a': stage"),
    (["--method", "mbw", "--experts", "a", "b", "--weights", "0,1"], "2 block weights, expected 9 (IN00 … OUT03) or 10"),
    (["--method", "slerp", "--experts", "a", "b", "c"], "slerp is of exactly 2 experts, and 3 were given"),
    (["--experts", "a", "x=b", "x=c"], "two experts are called 'x'"),
    (["--experts", "a", "b", "--vae", "nowhere"], "there is no folder or file nowhere"),
    (["--experts", "a", "b", "--vae", "a/unet"], "unet is no VAE (its config.json says UNet2DConditionModel)"),
    (["--experts", "a", "b", "--vae", "a", "--merge-vae"], "--vae a takes one VAE and --merge-vae merges them"),
    (["--experts", "a", "b/unet"], "'unet' cannot join 'a': it has 0 text encoders, expected 1"),
    (["--experts", "x=a/unet", "y=b/unet", "--output", "m.safetensors"], "'x' is only a denoiser"),
    (["--experts", "a", "b", "--output", "base"], "base exists already; choose another --output or delete it"),
    (["--experts", "a", "b", "--output", "b"], "--output b is expert 'b' itself; choose another place"),
    (["--experts", "a", "x=b.safetensors", "--output", "./b.safetensors"], "--output b.safetensors is expert 'x' itself"),
    (["--experts", "a", "b", "--output", "base.safetensors"], "base.safetensors exists already"),
    (["--experts", "a", "b", "--output", "m.ckpt"], "m.ckpt would be a pickle"),
    (["--experts", "a", "b+lora.safetensors"], "expert 'b': there is no LoRA file lora.safetensors"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS, ids=[" ".join(arguments) for arguments, _ in REFUSALS])
def test_what_cannot_be_merged_is_refused_in_one_sentence(arguments, sentence, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    output = [] if "--output" in arguments else ["--output", "merged"]
    assert afa_merge(*arguments, *output) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert sorted(home.iterdir()) == before


def test_a_weight_of_another_shape_is_named_with_both_shapes(home, tmp_path):
    other = saved(sd(1), tmp_path / "other")
    file = other / "text_encoder/model.safetensors"
    name = "encoder.layers.0.mlp.fc1.bias"
    save_file({**load_file(file), name: torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"fc1\.bias has shape \(7,\)"):
        make_plan(MergeSettings([str(home / "a"), str(other)], str(tmp_path / "merged")))


def test_pickled_weights_are_refused(home, tmp_path):
    other = saved(sd(1), tmp_path / "other", safe_serialization=False)
    with pytest.raises(UserError, match="pickled"):
        open_source(ExpertSpec.parse(str(other)))


def test_the_help_names_every_preset():
    assert set(PRESETS) <= set(merge.__doc__.split())
