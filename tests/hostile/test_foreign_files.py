"""Files that somebody else can make: pipes and pickles are never opened, places never become hub ids, records are read or refused."""

import contextlib
import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hostile import ASSETS, WRONG, afa, downloaded, edit, within

from afa import Ensemble
from afa.errors import UserError
from afa.experts import locate as locating
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.fingerprint import FILES
from afa.merging.optimisers import Journal
from afa.training.finetune import RECORD, finetune, finetune_finished
from afa.training.finetune_settings import LoraSettings
from afa.training.state import belongings, load_state, save_state, state_file

CURVES = str(ASSETS / "curves")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def pipe(folder, name):
    os.mkfifo(folder / name)
    return folder / name


def strange_places(folder):
    """Everything that is no plain file, by name."""
    (folder / "to-zero.safetensors").symlink_to("/dev/zero")
    (folder / "to-pipe.safetensors").symlink_to(pipe(folder, "pipe.safetensors"))
    inside = [folder / f"{name}.safetensors" for name in ("pipe", "to-zero", "to-pipe")]
    return [*inside, Path("/dev/zero"), Path("/dev/stdin"), Path("/proc/self/mem")]


def test_a_pipe_or_a_device_is_refused_as_an_expert_and_as_a_lora_without_being_opened(tmp_path):
    for place in strange_places(tmp_path):
        for text in (str(place), f"x={place}", f"{CURVES}+{place}", f"{CURVES}+{place}*0.5"):
            with within(10), pytest.raises(UserError, match=r"is no plain file|is no \.safetensors|is a '' file"):
                locate(ExpertSpec.parse(text))


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/more.bin", "pipe"])
def test_a_pipe_inside_an_expert_is_refused_without_being_opened(tmp_path, part):
    downloaded(tmp_path)
    (tmp_path / "curves" / part).unlink(missing_ok=True)
    pipe(tmp_path / "curves", part)
    with within(20):
        with pytest.raises(UserError, match="is no plain file|is no diffusers folder"):
            locate(ExpertSpec.parse(str(tmp_path / "curves")))
        for command in ("inspect", "merge"):
            given = ("--experts", tmp_path / "curves", tmp_path / "angles", "--output", tmp_path / "out") if command == "merge" else (tmp_path / "curves",)
            assert afa(command, *given).refused
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["style.bin", "style.pt", "style.ckpt", "style.pkl", "style", "style.safetensors"])
def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "RAN")))
    for text in (str(file), f"{CURVES}+{file}"):
        result = afa("inspect", text)
        assert result.refused, result
        with pytest.raises(UserError):
            Ensemble.from_experts([text], aggregator="mean")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("source", ["org/model", "curves/unet", "a/b/c.safetensors", "../gone", "/gone", "./gone"])
def test_a_place_that_a_manifest_names_and_that_is_missing_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.setattr(locating, "_from_hub", lambda spec: pytest.fail("looked for on the hub"))
    folder = downloaded(tmp_path)
    edit(folder / "afa.json", "experts", 0, "source", value=source)
    edit(folder / "afa.json", "experts", 0, "commit", value=None)
    edit(folder / "afa.json", "experts", 0, "files", value={})  # otherwise it is found by its sha256
    with pytest.raises(UserError, match="which is not there|there is no folder or file|no diffusers folder"):
        Ensemble.load(folder)
    with pytest.raises(UserError, match="there is no folder or file"):
        locate(ExpertSpec("x", "org/model", None, (), str(folder / "afa.json")))


def test_a_hub_id_that_a_manifest_names_is_shown_before_it_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = downloaded(tmp_path)
    edit(folder / "afa.json", "experts", 0, "source", value="stranger/model")
    edit(folder / "afa.json", "experts", 0, "commit", value=COMMIT)
    locating._announce.cache_clear()
    shown = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: shown.append(capsys.readouterr().err) or (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match="stranger/model"):
        Ensemble.load(folder)
    assert "stranger/model" in shown[0] and COMMIT in shown[0] and "afa.json" in shown[0]
    with pytest.raises(UserError, match="typed/model"):
        locate(ExpertSpec.parse("typed/model"))
    assert shown[-1] == ""  # what the user typed needs no saying


@pytest.fixture
def settings(tmp_path):
    return LoraSettings(expert=CURVES, data="scenes:12", output=str(tmp_path / "lora"), rank=2, steps=3, device="cpu")


STATES = ["empty", "text", "html", "pickle", "cut", "list", "settings missing", "settings no text", "settings a list", "settings deep", "a folder"]


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_damaged_or_a_stranger_s_is_refused_in_a_sentence_and_never_run(tmp_path, settings, kind):
    save_state(settings, {"rank": 2}, {"step": torch.zeros(3)})
    file = state_file(settings)
    whole = file.read_bytes()
    saved = {
        "list": [1, 2], "settings missing": {"step": 1}, "settings no text": {"settings": torch.zeros(2)},
        "settings a list": {"settings": "[1]"}, "settings deep": {"settings": "[" * 100_000},
    }  # fmt: skip
    content = {"empty": b"", "text": b"hello", "html": b"<html>", "pickle": pickle.dumps(Bomb(tmp_path / "RAN")), "cut": whole[: len(whole) // 2]}
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    elif kind in saved:
        torch.save(saved[kind], file)
    else:
        file.write_bytes(content[kind])
    with pytest.raises(UserError, match=r"state\.pt") as raised:
        load_state(settings, {"rank": 2}, torch.device("cpu"))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert not (tmp_path / "RAN").exists()


def test_hashes_of_another_kind_in_a_state_are_refused_in_a_sentence(settings):
    for value in (3, [1], "text", {"expert": 3}, {"expert": [1]}, True):
        save_state(settings, {"rank": 2, FILES: value}, {})
        with pytest.raises(UserError, match="sha256 of files"):
            load_state(settings, {"rank": 2, FILES: {}}, torch.device("cpu"))


PARTS = {"data": "d", "aggregators": {}, "optimiser": {}, "average": {}, "progress": {}, "best": []}
FOREIGN = {
    "nothing": {}, "no data": PARTS | {"data": None}, "data of numbers": PARTS | {"data": torch.zeros(3)}, "data of lists": PARTS | {"data": [torch.zeros(3)]},
    "numbers": dict.fromkeys(PARTS, 3), "another run": PARTS,
}  # fmt: skip


@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_a_state_of_another_run_ends_training_in_a_sentence(settings, state):
    small = replace(settings, resolution=32, batch_size=2, held_out=2, evaluate_every=1)
    save_state(small, belongings(small, True), state)
    with pytest.raises(UserError, match="is no state of this run|have changed since") as raised:
        finetune(small)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_pickle_inside_a_state_is_never_run(tmp_path, settings):
    save_state(settings, {"rank": 2}, {"step": Bomb(tmp_path / "RAN")})
    with pytest.raises(UserError, match=r"state\.pt cannot be read"):
        load_state(settings, {"rank": 2}, torch.device("cpu"))
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"settings": 3}', "\0", '{"settings": {"steps": "many"}}'])
def test_a_record_of_finetuning_that_is_damaged_is_refused_in_a_sentence(settings, text):
    Path(settings.output).mkdir()
    (Path(settings.output) / RECORD).write_text(text)
    with pytest.raises(UserError, match=r"finetune\.json") as raised:
        finetune_finished(settings)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("key", ["settings", "parameters", "steps", "seconds", "held_out_loss", "files"])
def test_a_record_of_finetuning_with_a_value_of_another_kind_is_refused_or_fits(settings, key):
    loss = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    record = {"settings": asdict(settings), "parameters": 1, "steps": 3, "seconds": 1.0, "held_out_loss": {"trained": loss, "expert": loss}, "files": {}}
    Path(settings.output).mkdir()
    file = Path(settings.output) / RECORD
    file.write_text(json.dumps(record))
    assert finetune_finished(settings) is not None
    for value in WRONG.values():
        file.write_text(json.dumps(record | {key: value}))
        with contextlib.suppress(UserError):
            finetune_finished(settings)


LINES = [
    *("[]", "3", "null", '"text"', "{}", '{"weights": 3, "scores": []}', '{"weights": {"IN00": ["a"]}, "scores": [1]}'),
    *('{"weights": {"IN00": [1]}, "scores": "x"}', '{"weights": {"IN00": [NaN]}, "scores": [1]}', '{"weights": {"IN00": [true]}, "scores": [1]}'),
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_journal_that_is_no_point_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "journal.jsonl").write_text('{"weights": {"IN00": [0.5]}, "scores": [1.0]}\n' + line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 2") as raised:
        Journal(tmp_path / "journal.jsonl", lambda _: [1.0])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("torn", ['{"weights": {"IN', "[" * 100_000, ""])
def test_a_torn_line_of_a_journal_is_evaluated_again(tmp_path, torn):
    (tmp_path / "journal.jsonl").write_text('{"weights": {"IN00": [0.5]}, "scores": [1.0]}\n' + torn)
    journal = Journal(tmp_path / "journal.jsonl", lambda _: [1.0])
    assert len(journal.points) == 1


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n", b"a\0b"])
def test_a_journal_that_is_no_text_is_refused_in_a_sentence(tmp_path, data):
    (tmp_path / "journal.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=r"journal\.jsonl"):
        Journal(tmp_path / "journal.jsonl", lambda _: [1.0])
    (tmp_path / "journal.jsonl").unlink()
    pipe(tmp_path, "journal.jsonl")
    with within(10), pytest.raises(UserError, match="no plain file"):
        Journal(tmp_path / "journal.jsonl", lambda _: [1.0])
