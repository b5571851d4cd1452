"""Ensembles on the hub: what is pushed comes back, nothing runs, nothing leaves its folder, and each refusal is one sentence."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import READER, Repository, hub
from huggingface_hub import constants
from PIL import Image
from test_checkpoint import SMALL, trained
from test_experts import write_lora
from test_pipeline import run
from tiny import sd_pipeline

from afa import Ensemble, UserError
from afa.checkpoint.hub import fetch_ensemble
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST, read_manifest
from afa.checkpoint.publish import own_files, publication
from afa.cli.main import main
from afa.places import public_place


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved ensemble of two folders, and the picture that it draws. No test changes it."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(["photo", "paint"]):
        sd_pipeline(seed).save_pretrained(folder / name)
    (folder / "photo" / "README.md").write_text("---\nlicense: openrail\n---\n")
    (folder / "photo" / "unet" / "evil.py").write_text("raise SystemExit('this must not run')\n")
    ensemble = trained(Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], vae=str(folder / "paint" / "vae"), **SMALL))
    ensemble.save(folder / "mine")
    return folder / "mine", run(ensemble.pipeline())


@pytest.fixture(scope="module")
def loaded(made):
    """The saved ensemble. No test changes it."""
    return Ensemble.load(made[0])


def lonely(made, tmp_path):
    """A copy of the ensemble without its experts."""
    return Path(shutil.copytree(made[0], tmp_path / "lonely" / "mine"))


def refused(call, *words):
    with pytest.raises(UserError) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    for word in words:
        assert word in said
    return said


def test_what_is_pushed_with_its_experts_draws_the_same_elsewhere(made, server, tmp_path):
    folder, picture = made
    url = Ensemble.load(folder).push_to_hub("me/mine", bundle=True, commit_message="first")
    assert url.startswith(f"{server.url}/me/mine/commit/")
    names = set(server.repositories["me/mine"].files)
    assert {MANIFEST, AGGREGATORS, "README.md", "model_index.json", "pipeline.py", "ensemble/loader.py"} <= names
    assert not any(name.endswith(".py") for name in names - {"pipeline.py", "ensemble/loader.py"})
    server.seen.clear()
    loaded = Ensemble.from_pretrained("me/mine")
    assert np.array_equal(run(loaded.pipeline()), picture)
    assert not any(".py" in request for request in server.seen)  # code is not even downloaded
    everything = b"".join(data for name, data in server.repositories["me/mine"].files.items() if not name.endswith(".safetensors"))
    assert str(tmp_path).encode() not in everything and str(folder.parent).encode() not in everything
    constants.HF_HUB_OFFLINE = True
    assert np.array_equal(run(Ensemble.from_pretrained("me/mine").pipeline()), picture)


def test_experts_in_memory_are_pushed_with_the_ensemble(server):
    ensemble = trained(Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL))
    refused(lambda: ensemble.push_to_hub("me/memory"), "bundle=True")
    assert not server.repositories
    ensemble.push_to_hub("me/memory", bundle=True, private=True)
    assert server.repositories["me/memory"].private
    assert np.array_equal(run(Ensemble.from_pretrained("me/memory").pipeline()), run(ensemble.pipeline()))


def test_without_its_experts_an_ensemble_names_them_and_finds_them_by_sha256(made, server, tmp_path, capsys):
    folder, picture = made
    assert main(["push", str(folder), "me/mine"]) == 0
    assert "photo, paint will not be found on other machines" in capsys.readouterr().err
    manifest = json.loads(server.repositories["me/mine"].files[MANIFEST])
    assert [one["source"] for one in manifest["experts"]] == ["photo", "paint"]
    (models := tmp_path / "models" / "deep").mkdir(parents=True)
    shutil.copytree(folder.parent / "photo", models / "called otherwise")
    shutil.copytree(folder.parent / "paint", models / "paint")
    refused(lambda: Ensemble.from_pretrained("me/mine"), "expert 'photo' was at", "expert 'paint' was at", "--experts photo=PLACE paint=PLACE")
    assert np.array_equal(run(Ensemble.from_pretrained("me/mine", experts=[str(tmp_path / "models")]).pipeline()), picture)


def test_a_single_file_and_a_lora_are_found_under_other_names(made, tmp_path):
    from original_layout import write_single_file

    write_single_file(sd_pipeline(2), tmp_path / "styled.safetensors")
    lora = write_lora(sd_pipeline(0), tmp_path / "lora.safetensors")
    sources = [f"styled={tmp_path / 'styled.safetensors'}+{lora}*0.5", str(made[0].parent / "paint")]
    ensemble = trained(Ensemble.from_experts(sources, config=str(made[0].parent / "photo"), **SMALL))
    picture = run(ensemble.pipeline())
    ensemble.save(tmp_path / "mine")
    (tmp_path / "styled.safetensors").rename(tmp_path / "renamed.safetensors")
    (tmp_path / "store").mkdir()
    lora.rename(tmp_path / "store" / "x.safetensors")
    refused(lambda: Ensemble.load(tmp_path / "mine"), "LoRA 1 of expert 'styled' was at")
    again = Ensemble.load(tmp_path / "mine", [str(tmp_path / "store")])
    assert np.array_equal(run(again.pipeline()), picture)
    again.save(tmp_path / "again")
    assert np.array_equal(run(Ensemble.load(tmp_path / "again", [str(tmp_path / "store")]).pipeline()), picture)


def test_a_changed_expert_is_not_taken_for_the_recorded_one(made, tmp_path):
    folder = lonely(made, tmp_path)
    for name in ("photo", "paint"):
        shutil.copytree(made[0].parent / "photo", tmp_path / "models" / name)
    said = refused(lambda: Ensemble.load(folder, [str(tmp_path / "models")]), "expert 'paint' was at", str(tmp_path / "models"))
    assert "'photo' was at" not in said
    refused(lambda: Ensemble.load(folder, ["nowhere"]), "--experts nowhere names no expert; write NAME=nowhere, or give a folder")


def test_a_hub_id_may_stand_wherever_a_command_takes_an_ensemble(made, server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", "demo:ensemble", "me/demo"]) == 0
    source = "me/demo@main"
    drawing = ["--prompt", "a ring", "--steps", "1", "--device", "cpu"]
    assert main(["inspect", source]) == 0
    assert main(["generate", source, *drawing, "--output", "out"]) == 0
    assert main(["push", source, "--output", "copy", "--bundle"]) == 0
    assert np.array_equal(draws(Ensemble.load("copy")), draws(Ensemble.load("demo:ensemble")))
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as picture:
        assert f"me/demo@{server.repositories['me/demo'].branches['main']}" in str(picture.info)
    assert main(["calibrate", source, "--prompt", "a", "--metric", "attributes"]) == 2
    assert "hf download me/demo@main" in capsys.readouterr().err


def test_every_option_for_an_ensemble_takes_a_hub_id():
    """Only calibrate does not: it writes into the ensemble's folder."""
    import importlib
    from dataclasses import fields

    from afa.cli.main import COMMANDS

    options = {verb: fields(importlib.import_module(module).Options.current()) for verb, module in COMMANDS.items()}
    found = {f"{verb} {field.name}" for verb, all_ in options.items() for field in all_ if field.metadata.get("ensemble")}
    expected = "inspect experts, generate sources, ui sources, explain ensemble, evaluate ensemble, distill ensemble, push ensemble"
    assert found == {*expected.split(", "), "train start", "finetune like"}


def draws(ensemble):
    import torch

    pipe = ensemble.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe("a ring", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0])


@contextlib.contextmanager
def broken(server, pattern):
    """Requests are broken off, more often than huggingface_hub tries again."""
    server.fail += [pattern] * 50
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.sleep", lambda seconds: None)
        yield
    server.fail.clear()


def test_an_interrupted_upload_sends_nothing_twice_and_shows_nothing_half(made, server):
    published = publication(made[0], bundle=True)
    from afa.checkpoint.hub import push

    with broken(server, "/commit/main"):
        refused(lambda: push(published, "me/mine"), "me/mine", "the hub does not answer")
    assert MANIFEST not in server.repositories["me/mine"].files
    sent = [request for request in server.seen if request.startswith("PUT")]
    assert sent
    server.seen.clear()
    push(published, "me/mine")
    assert not [request for request in server.seen if request.startswith("PUT")]
    assert set(published.files) <= set(server.repositories["me/mine"].files)


def test_an_interrupted_download_is_never_taken_for_whole(made, loaded, server):
    loaded.push_to_hub("me/mine", bundle=True)
    with broken(server, f"GET .*/{AGGREGATORS}"):
        refused(lambda: Ensemble.from_pretrained("me/mine"), "me/mine", "the hub does not answer")
    constants.HF_HUB_OFFLINE = True
    refused(lambda: fetch_ensemble("me/mine"), "me/mine", "as a whole", "HF_HUB_OFFLINE is set")
    constants.HF_HUB_OFFLINE = False
    assert np.array_equal(run(Ensemble.from_pretrained("me/mine").pipeline()), made[1])


def test_a_second_push_takes_away_what_is_no_longer_part(loaded, server):
    loaded.push_to_hub("me/mine", bundle=True)
    assert any(name.startswith("experts/") for name in server.repositories["me/mine"].files)
    server.repositories["me/mine"].files["notes.txt"] = b"of the user"
    loaded.push_to_hub("me/mine")
    files = server.repositories["me/mine"].files
    assert not any(name.startswith("experts/") for name in files) and "notes.txt" in files


def test_another_model_is_not_overwritten(loaded, server):
    server.repositories["me/model"] = Repository()
    server.repositories["me/model"].commit({"model_index.json": b"{}"})
    refused(lambda: loaded.push_to_hub("me/model"), "me/model holds another model (model_index.json)")


@pytest.mark.parametrize(
    ("prepare", "call", "words"),
    [
        (None, lambda e: e.push_to_hub("me/mine@main"), ["'me/mine' is no name", "--revision main"]),
        (None, lambda e: e.push_to_hub("../mine"), ["is no name of a repository"]),
        (None, lambda e: e.push_to_hub("me/mine", token="hf_wrong"), ["me/mine", "not valid (401)", "hf auth login"]),
        (None, lambda e: e.push_to_hub("me/mine", token=READER), ["me/mine", "(403)", "may write"]),
        (None, lambda e: e.push_to_hub("me/mine", revision="nowhere"), ["me/mine has no revision nowhere"]),
        (None, lambda e: e.push_to_hub("me/mine", license="no licence: [x"), ["--license no licence: [x"]),
        (None, lambda e: Ensemble.from_pretrained("no/such"), ["there is no repository no/such", "private"]),
        ({}, lambda e: Ensemble.from_pretrained("me/there"), ["me/there is no ensemble", "afa.json"]),
        ({}, lambda e: Ensemble.from_pretrained("me/there", revision="gone"), ["me/there has no revision gone"]),
        ({}, lambda e: Ensemble.from_pretrained("me/there@a", revision="b"), ["me/there@a and revision b disagree"]),
        ({"private": True}, lambda e: Ensemble.from_pretrained("me/there", token=False), ["no repository me/there", "private"]),
        ({"gated": True}, lambda e: Ensemble.from_pretrained("me/there"), ["me/there is gated"]),
        (None, lambda e: Ensemble.from_pretrained("no-such-folder"), ["no folder no-such-folder", "org/name"]),
    ],
)
def test_each_refusal_is_one_sentence(loaded, server, prepare, call, words):
    if prepare is not None:
        server.repositories["me/there"] = Repository(**prepare)
        server.repositories["me/there"].commit({"README.md": b""})
    refused(lambda: call(loaded), *words)


def test_without_a_network_the_answer_comes_at_once(loaded, monkeypatch, tmp_path):
    import time

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    refused(lambda: Ensemble.from_pretrained("me/mine"), "me/mine is not in the hub's cache as a whole, and HF_HUB_OFFLINE is set")
    refused(lambda: loaded.push_to_hub("me/mine"), "me/mine cannot be uploaded: HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    refused(lambda: fetch_ensemble("me/mine"), "me/mine cannot be had: the hub does not answer")
    assert time.monotonic() - began < 5


UNREACHABLE = """
import sys, time
import afa.inspection, afa.merging.engine, afa.training.run, datasets
from afa.cli.main import main
for command in sys.argv[1:]:
    began = time.monotonic()
    code = main(command.split())
    print(code, time.monotonic() - began)
"""


def test_no_command_waits_for_a_hub_that_does_not_answer(tmp_path):
    """huggingface_hub tries five times, for half a minute, unless it is told that it is offline."""
    commands = (
        "inspect org/model",
        "inspect org/model@main",
        "inspect org/model/file.safetensors",
        "merge --experts org/one org/other --output out",
        "generate org/model --prompt a --output out --device cpu",
        "train --experts demo:curves demo:angles --data org/images --output out --device cpu",
    )
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in offline} | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", UNREACHABLE, *commands], env=env, capture_output=True, text=True, cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [code for code, _ in lines] == ["2"] * len(commands), done.stderr
    assert max(float(seconds) for _, seconds in lines) < 10
    assert done.stderr.count("not answer") == len(commands) and "Retrying" not in done.stderr


OUTSIDE = ["../../../../../secret", "/etc", "experts/../../secret"]


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("key", ["source", "lora", "config", "vae"])
def test_a_downloaded_manifest_names_no_file_outside_its_folder(made, server, tmp_path, place, key, monkeypatch):
    shutil.copytree(made[0].parent / "photo", tmp_path / "secret")
    manifest = json.loads((made[0] / MANIFEST).read_text())
    expert = manifest["experts"][0]
    manifest["frame"]["vae"] = "photo"
    if key == "source":
        expert["source"] = place
    elif key == "lora":
        expert["loras"] = [{"path": f"{place}/x.safetensors", "strength": 1.0}]
    elif key == "config":
        expert["config"] = place
    else:
        manifest["frame"]["vae"] = place
    server.repositories["bad/one"] = repository = Repository()
    repository.commit({MANIFEST: json.dumps(manifest).encode(), AGGREGATORS: (made[0] / AGGREGATORS).read_bytes(), "x.py": b"raise SystemExit"})
    read = []
    monkeypatch.setattr("afa.checkpoint.sources.sha256", lambda path: read.append(path) or "")
    said = refused(lambda: Ensemble.from_pretrained("bad/one"), place if key != "lora" else "LoRA 1 of expert")
    assert "not there" in said or "out of the folder" in said
    assert not any("secret" in str(path) or str(path).startswith("/etc") for path in read)
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_a_repository_cannot_write_outside_the_cache(made, server, tmp_path):
    manifest = json.loads((made[0] / MANIFEST).read_text())
    manifest["experts"][0]["source"] = "experts"
    manifest["frame"]["vae"] = "photo"
    server.repositories["bad/one"] = repository = Repository()
    evil = "experts/../../../../../../escaped.json"
    repository.commit({MANIFEST: json.dumps(manifest).encode(), AGGREGATORS: (made[0] / AGGREGATORS).read_bytes(), evil: b"{}"})
    with pytest.raises((UserError, ValueError, OSError)):
        Ensemble.from_pretrained("bad/one")
    assert not list(tmp_path.rglob("escaped.json"))


def test_what_is_downloaded_can_be_no_code_and_no_pickle(made):
    manifest = read_manifest(made[0])
    manifest.experts[0].source, manifest.experts[1].source = "*", "a[b]"
    patterns = own_files(manifest)
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".ckpt", "*")) for pattern in patterns)
    assert "[*]/*.safetensors" in patterns and "a[[]b]/*.json" in patterns


def test_the_card_is_yaml_whatever_strangers_have_written(made, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(made[0].parent, tmp_path / "all")
    folder = tmp_path / "all" / "mine"
    (tmp_path / "all" / "paint" / "README.md").write_text("---\nlicense: !!python/object/apply:os.system ['x']\n---\n")
    card = publication(folder, bundle=True).files["README.md"]
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["library_name"] == "afa" and "license" not in data  # one expert's is not known
    assert "openrail" in card and "python/object" not in card
    (tmp_path / "all" / "paint" / "README.md").write_text("---\nlicense: mit\n---\n")
    data = yaml.safe_load(publication(folder, bundle=True).files["README.md"].split("---\n")[1])
    assert data["license"] == "other"
    data = yaml.safe_load(publication(folder, licence="apache-2.0", repository="me/mine").files["README.md"].split("---\n")[1])
    assert data["license"] == "apache-2.0"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["experts"][0] |= {"source": "org/base-model", "commit": "a" * 40}
    manifest["experts"][1] |= {"source": "org/base-model", "commit": "b" * 40}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    data = yaml.safe_load(publication(folder, licence="mit").files["README.md"].split("---\n")[1])
    assert data["base_model"] == ["org/base-model"] and data["base_model_relation"] == "merge"


def test_a_trained_ensembles_card_has_what_training_measured():
    card = publication(Path(__file__).parent.parent / "afa" / "demo" / "assets" / "ensemble").files["README.md"]
    data = yaml.safe_load(card.split("---\n")[1])
    (result,) = data["model-index"][0]["results"]
    assert 0.1 < result["metrics"][0]["value"] < 0.3


def test_a_snapshot_of_the_hub_is_named_by_its_id():
    place = "/home/me/.cache/huggingface/hub/models--org--na-me/snapshots/0123abc"
    assert public_place(place) == "org/na-me@0123abc"
    assert public_place("/home/me/snapshots/0123abc") == "0123abc"


def test_the_loader_for_sdnext_makes_a_stock_pipeline(tmp_path, monkeypatch):
    """The file that docs/sdnext.md shows is run; of SD.Next there are only the three names that it reads."""
    import types

    import diffusers
    import torch

    page = (Path(__file__).parent.parent / "docs" / "sdnext.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    options = types.SimpleNamespace(diffusers_dir=str(tmp_path))
    parts = {"devices": {"dtype": torch.float32}, "sd_models": {}, "shared": {"opts": options}}
    modules = types.SimpleNamespace(**{name: types.SimpleNamespace(**values) for name, values in parts.items()})
    monkeypatch.setitem(sys.modules, "modules", modules)
    assert main(["push", "demo:ensemble", "--output", str(tmp_path / "model"), "--bundle"]) == 0
    names: dict = {}
    exec(compile(code, "docs/sdnext.md", "exec"), names)
    place = types.SimpleNamespace(path=str(tmp_path / "model"))
    pipe = names["load_afa"](place, {"torch_dtype": torch.float16, "local_files_only": True})
    assert type(pipe) is diffusers.StableDiffusionPipeline and pipe.unet.dtype == torch.float16


DIFFUSERS = """
import sys, diffusers, numpy, torch
from afa import Ensemble
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return numpy.asarray(pipe("a ring", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0])
place = sys.argv[1]
try:
    diffusers.DiffusionPipeline.from_pretrained(place)
    raise SystemExit("code ran that nobody has trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
pipe = diffusers.DiffusionPipeline.from_pretrained(place, trust_remote_code=True, dtype=torch.float32)
assert type(pipe) is diffusers.StableDiffusionPipeline, type(pipe)
assert (draw(pipe) == draw(Ensemble.from_pretrained(place).pipeline())).all()
"""


def test_diffusers_loads_the_repository_as_a_stock_pipeline_if_its_user_trusts_the_code(server, tmp_path):
    assert main(["push", "demo:ensemble", "me/demo", "--bundle"]) == 0
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", DIFFUSERS, "me/demo"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
