"""A recipe of steps, and one in the header of a file that somebody else made: what is wrong is one sentence, nothing is read
from elsewhere, nothing is written."""

import json
import shutil

import pytest
import torch
from hostile import ASSETS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afa.cli.main import main
from afa.files import sha256

KEY = "afa.merge"
UNET = "unet/diffusion_pytorch_model.safetensors"


def refused(capsys, *arguments) -> str:
    """What a refused merge says: one sentence, exit code 2."""
    capsys.readouterr()
    code = main(["merge", *map(str, arguments)])
    said = capsys.readouterr().err
    lines = [line for line in said.split("\n") if line and not line.startswith("\rmerging:")]  # a bar may have begun
    assert code == 2 and len(lines) == 1, said
    return lines[0]


# ---- a file of steps

TWO = '[[step]]\nname = "one"\nexperts = ["demo:curves", "demo:angles"]\n'
TOML = [
    ("", "step"),
    ("steps = []", "there is no key 'steps'; did you mean 'step'?"),
    ("step = 3", "step"),
    ("[[step]]\nexpert = ['demo:curves']", "step 1: there is no key 'expert'; did you mean 'experts'?"),
    ("[[step]]\nexperts = []", "experts"),
    ("[[step]]\nexperts = 'demo:curves'", "experts"),
    ("[[step]]\nname = 'x'", "experts is missing"),
    ("[[step]]\nexperts = ['demo:curves']\nmethod = 'tise'", "there is no merge 'tise'; did you mean 'ties'?"),
    ("[[step]]\nexperts = ['demo:curves']\noptions = {weight = [1]}", "there is no option 'weight'; did you mean 'weights'?"),
    ("[[step]]\nexperts = ['demo:curves']\noptions = {weights = [[1]]}", "options.weights"),
    ("[[step]]\nexperts = ['demo:curves']\ndtype = 'float64'", "dtype"),
    ("[[step]]\nexperts = ['demo:curves']\nvae = 'demo:base'\nmerge_vae = true", "leave out one"),
    ("[[step]]\nexperts = ['demo:curves']\nmethod = 'ties'", "ties adds what experts learnt to their base"),
    ("[[step]]\nexperts = ['demo:curves']\n[[step]]\nexperts = ['demo:angles']", "step 1 has no name"),
    (f"{TWO}{TWO}[[step]]\nexperts = ['one']", "step 2 is called 'one' as step 1 is"),
    (f"{TWO}[[step]]\nexperts = ['demo:angles']", "step 1 ('one') is used by no later step"),
    (TWO.replace("demo:angles", "two") + "[[step]]\nname = 'two'\nexperts = ['one']", "uses 'two', which is not made before it"),
    (TWO.replace("'one'", "'../one'").replace('"one"', '"../one"') + "[[step]]\nexperts = ['../one']", "../one"),
    (f"{TWO}[[step]]\nexperts = ['one+nowhere.safetensors']", "step 2: expert 'one': there is no LoRA file nowhere.safetensors"),
    (f"{TWO}[[step]]\nexperts = ['one', 'nowhere']", "step 2: there is no folder or file nowhere"),
    ("[[step]]\nexperts = ['demo:curves'", "is not TOML"),
    ("\0", "NUL"),
]


@pytest.mark.parametrize(("text", "sentence"), TOML)
def test_a_recipe_that_makes_no_sense_is_refused_by_step_and_key(text, sentence, tmp_path, capsys):
    (tmp_path / "merge.toml").write_text(text)
    said = refused(capsys, "--recipe", tmp_path / "merge.toml", "--output", tmp_path / "out")
    assert (sentence in said and "merge.toml" in said) or "merge '" in said or "ties adds" in said or "option 'weight'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["merge.toml"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--weights", "1"], "leave out --weights"),
        (["--method", "ties"], "leave out --method"),
        (["--experts", "demo:curves"], "leave out --experts"),
        (["--merge-vae"], "leave out --merge-vae"),
    ],
)
def test_what_a_recipe_says_is_not_said_beside_it(more, sentence, tmp_path, capsys):
    assert sentence in refused(capsys, "--recipe", tmp_path / "merge.toml", *more, "--output", tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere.toml", "nowhere.safetensors", "nowhere", "plain.safetensors", ".", "word.txt"])
def test_what_holds_no_recipe_is_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "word.txt").write_text("x")
    assert name in refused(capsys, "--recipe", name, "--output", "out") or name == "."


def test_neither_experts_nor_a_recipe_is_refused(tmp_path, capsys):
    assert "--experts is needed" in refused(capsys, "--output", tmp_path / "out")
    assert "--output is needed" in refused(capsys, "--experts", "demo:curves")


# ---- a header


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a merge of two others in it. No test changes it."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("curves", "angles"):
        shutil.copytree(ASSETS / name, folder / f"my-{name}")
    assert main(["merge", "--experts", str(folder / "my-curves"), str(folder / "my-angles"), "--output", str(folder / "merged.safetensors")]) == 0
    return folder


@pytest.fixture
def merged(made, tmp_path):
    """A merge of two folders that lie beside it: -> its file, and how to write another recipe into its header."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "merged.safetensors"

    def rewrite(change) -> None:
        with safe_open(file, "pt") as opened:
            strings = opened.metadata()
        record = json.loads(strings[KEY])
        record = change(record) or record
        save_file(load_file(file), file, {**strings, KEY: record if isinstance(record, str) else json.dumps(record)})

    return file, rewrite


def test_an_input_that_is_not_there_is_named_with_its_hash(merged, tmp_path, capsys):
    file, _ = merged
    digest = sha256(ASSETS / "angles" / UNET)
    shutil.move(tmp_path / "my-angles", tmp_path / "moved")
    said = refused(capsys, "--recipe", file, "--output", tmp_path / "again.safetensors")
    assert "input 'my-angles'" in said and "--experts my-angles=PLACE" in said
    assert main(["merge", "--recipe", str(file), "--experts", f"my-angles={tmp_path / 'moved'}", "--output", str(tmp_path / "again.safetensors")]) == 0
    assert sha256(tmp_path / "again.safetensors") == sha256(file)
    assert digest in file.read_bytes()[:20000].decode(errors="replace")


def test_an_input_of_another_hash_is_named_with_both(merged, tmp_path, capsys):
    file, _ = merged
    then = sha256(tmp_path / "my-angles" / UNET)
    tensors = load_file(tmp_path / "my-angles" / UNET)
    save_file({name: tensor + 0 if name != "conv_in.bias" else tensor + 1 for name, tensor in tensors.items()}, tmp_path / "my-angles" / UNET, {"format": "pt"})
    said = refused(capsys, "--recipe", file, "--output", tmp_path / "again.safetensors")
    assert "'my-angles'" in said and UNET in said and then in said and sha256(tmp_path / "my-angles" / UNET) in said
    assert not (tmp_path / "again.safetensors").exists()


def write_lora(file, seed):
    """For the first layer of an embedded model."""
    rows, channels, *kernel = load_file(ASSETS / "curves" / UNET)["conv_in.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    factors = {"A": torch.randn(2, channels, *kernel, generator=generator), "B": torch.randn(rows, 2, 1, 1, generator=generator)}
    save_file({f"unet.conv_in.lora_{name}.weight": tensor for name, tensor in factors.items()}, file)


def test_a_lora_that_is_not_there_or_another_is_named_with_its_hashes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = tmp_path / "style.safetensors"
    write_lora(lora, 0)
    then = sha256(lora)
    assert main(["merge", "--experts", "one=demo:curves+style.safetensors*0.5", "--output", "merged.safetensors"]) == 0
    lora.rename(tmp_path / "moved.safetensors")
    said = refused(capsys, "--recipe", "merged.safetensors", "--output", "again.safetensors")
    assert "the LoRA of 'one'" in said and then in said and "--experts one=PLACE+LORA*STRENGTH" in said
    place = "one=demo:curves+moved.safetensors*0.5"
    assert main(["merge", "--recipe", "merged.safetensors", "--experts", place, "--output", "again.safetensors"]) == 0
    assert sha256(tmp_path / "again.safetensors") == sha256(tmp_path / "merged.safetensors")
    weaker = refused(capsys, "--recipe", "merged.safetensors", "--experts", place.replace("0.5", "0.4"), "--output", "third.safetensors")
    assert "0.4" in weaker and "0.5" in weaker
    write_lora(lora, 1)
    said = refused(capsys, "--recipe", "merged.safetensors", "--output", "third.safetensors")
    assert then in said and sha256(lora) in said and "style.safetensors" in said


def test_a_lora_that_is_broken_does_not_fit_or_is_for_a_denoiser_alone_is_refused(tmp_path, capsys):
    lora, output = tmp_path / "style.safetensors", ["--output", tmp_path / "merged"]
    write_lora(lora, 0)
    assert "only a denoiser" in refused(capsys, "--experts", f"{ASSETS / 'curves/unet'}+{lora}", *output)
    tensors = load_file(lora)
    save_file({name.replace("conv_in", "conv_inn"): tensor for name, tensor in tensors.items()}, lora)
    assert "does not fit expert 'curves'" in refused(capsys, "--experts", f"demo:curves+{lora}", *output)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, lora)
    assert "not finite" in refused(capsys, "--experts", f"demo:curves+{lora}", *output)
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, lora)
    said = refused(capsys, "--experts", f"demo:curves+{lora}", *output)
    assert "'curves': unet.conv_in.weight does not fit float32 with the LoRA in it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]


def test_places_for_what_is_no_input_are_refused(merged, tmp_path, capsys):
    file, _ = merged
    said = refused(capsys, "--recipe", file, "--experts", "my-curvs=x", "--output", tmp_path / "again.safetensors")
    assert "did you mean 'my-curves'" in said
    assert "names no expert" in refused(capsys, "--recipe", file, "--experts", "x", "--output", tmp_path / "again.safetensors")


def expert(**changes):
    """A change of the first expert of a recipe."""
    return lambda record: record["experts"][0].update(changes)


CHANGES = {
    "a path": expert(source="../secret"),
    "an absolute path": expert(source="/etc"),
    "a place above": expert(source=".."),
    "the same folder": expert(source="."),
    "a home": expert(source="~"),
    "a device": expert(source="NUL"),
    "an unknown embedded model": expert(source="demo:secrets"),
    "an embedded path": expert(source="demo:../../secrets"),
    "a place above an embedded one": expert(source="demo:curves/../angles"),
    "no hashes": expert(sha256={}),
    "a hub id without commit": expert(source="somebody/model"),
    "a path as a commit of the hub": expert(source="my-curves/unet", commit="0" * 40),
    "a path above as a commit of the hub": expert(source="../merged.safetensors", commit="0" * 40),
    "a name that is a path": expert(name="../x"),
    "no source": expert(source=None),
    "a LoRA elsewhere": expert(loras=[{"source": "../style.safetensors", "sha256": "0" * 64}]),
    "a LoRA of no strength": expert(loras=[{"source": "style.safetensors", "sha256": "0" * 64, "strength": "x"}]),
    "a step that is none": expert(step="merged"),
    "itself as a step": lambda record: record.update(steps=[{**record, "name": "x"}], experts=[{"name": "x", "step": "y"}]),
    "no hash": expert(sha256={"unet": "none"}),
    "an unknown key": lambda record: record.update(code="import os"),
    "an unknown method": lambda record: record.update(method="os.system"),
    "no expert": lambda record: record.update(experts=[]),
    "weights from a file": lambda record: record.update(method="mbw", options={"weights": "/etc/weights.toml"}),
    "weights from files": lambda record: record.update(method="mbw", options={"weights": ["a.toml", "b.toml"]}),
    "weights of three": lambda record: record.update(options={"weights": [1, 2, 3]}),
    "weights that are words": lambda record: record.update(options={"weights": {"others": ["x", "y"]}}),
    "an option of none": lambda record: record.update(options={"weights": [0.5, 0.5], "density": 1}),
    "a dtype of none": lambda record: record.update(dtype="os"),
    "a file without a hash": lambda record: record["experts"].append({"name": "x", "source": "other.safetensors"}),
    "a config elsewhere": lambda record: record.update(config="../config"),
    "a VAE elsewhere": lambda record: record.update(vae={"name": "vae", "source": "/etc", "sha256": {}}),
    "a list": lambda record: json.dumps([record]),
    "no JSON": lambda record: "{",
    "too deep": lambda record: "[" * 5000,
    "a key twice": lambda record: '{"method": "weighted", "method": "ties"}',
    "NaN": lambda record: json.dumps({**record, "options": {"weights": [float("nan"), 1]}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_of_somebody_else_reads_nothing_elsewhere_and_writes_nothing(name, merged, tmp_path, capsys, monkeypatch):
    """There would be something to read: were a path followed, the merge would go through, or fail at its weights."""
    monkeypatch.chdir(tmp_path)
    file, rewrite = merged
    shutil.copytree(ASSETS / "curves", tmp_path / "y")  # what a step that is none may not find
    shutil.copyfile(file, tmp_path / "other.safetensors")
    rewrite(CHANGES[name])
    before = sorted(path.name for path in tmp_path.iterdir())
    said = refused(capsys, "--recipe", file, "--output", "again.safetensors")
    assert "merged.safetensors" in said or "embedded model" in said or "weight" in said or "merge '" in said or "option" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_recipe_of_another_version_is_made_with_a_warning(merged, tmp_path, capsys):
    file, rewrite = merged
    rewrite(lambda record: record.update(afa="0.0.1"))
    assert main(["merge", "--recipe", str(file), "--output", str(tmp_path / "again.safetensors")]) == 0
    assert '"0.0.1"' in capsys.readouterr().err
