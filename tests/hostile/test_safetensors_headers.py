"""Broken, packed and foreign .safetensors files: one sentence that names the file, from the one reader, for every caller."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from afa.errors import UserError
from afa.experts.dtypes import BITS
from afa.experts.headers import check_fit, load_tensors, read_file, read_header, read_metadata
from afa.experts.locate import locate
from afa.experts.lora import read_lora
from afa.experts.spec import ExpertSpec

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header, body: int = 8, length: int | None = None) -> Path:
    """A file with this header: an object, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * body)
    return path


def tensor(**changes):
    return {"a.weight": {**ONE, **changes}}


BROKEN = {
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "nested lists": b"[" * 5000 + b"]" * 5000,
    "nested tensor": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "no JSON": b"{a}",
    "empty": b"",
    "not UTF-8": b'{"\xff": null}',
    "a name twice": b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "NaN": b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "tensor null": {"a": None},
    "tensor list": {"a": [1]},
    "tensor text": {"a": "F32"},
    "tensor empty": {"a": {}},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype unknown": tensor(dtype="F33"),
    "dtype list": tensor(dtype=["F32"]),
    "dtype null": tensor(dtype=None),
    "shape null": tensor(shape=None),
    "shape number": tensor(shape=2),
    "shape nested": tensor(shape=[[2]]),
    "shape float": tensor(shape=[2.0]),
    "shape bool": tensor(shape=[True, 2]),
    "shape negative": tensor(shape=[-1, -2]),
    "shape huge": tensor(shape=[10**30, 10**30]),
    "shape other": tensor(shape=[3]),
    "offsets one": tensor(data_offsets=[8]),
    "offsets three": tensor(data_offsets=[0, 8, 8]),
    "offsets none": tensor(data_offsets=[]),
    "offsets null": tensor(data_offsets=None),
    "offsets float": tensor(data_offsets=[0.0, 8.0]),
    "offsets text": tensor(data_offsets=["0", "8"]),
    "offsets negative": tensor(data_offsets=[-8, 0]),
    "offsets backwards": tensor(data_offsets=[8, 0]),
    "overlap": {"a": ONE, "b": ONE},
    "gap": {"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}},
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_by_the_name_of_its_file(tmp_path, header):
    file = write(tmp_path / "x.safetensors", header, body=20)
    for read in (read_header, read_file, read_metadata, load_tensors, read_lora):
        with pytest.raises(UserError, match="x.safetensors is not a readable .safetensors file") as raised:
            read(file)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 600
    with pytest.raises(UserError, match="x.safetensors"):  # every command finds experts with it
        _ = locate(ExpertSpec("x", str(file))).whole_pipeline


@pytest.mark.parametrize("kind", sorted(BROKEN.keys() - {"a name twice"}))  # of which the library takes one
def test_what_is_refused_as_broken_the_library_refuses_too(tmp_path, kind):
    file = write(tmp_path / "x.safetensors", BROKEN[kind], body=20)
    with pytest.raises(Exception, match=".+"), safe_open(file, "pt") as opened:
        [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "header of 0 bytes is promised, the file has 0"),
        (b"abc", "promised"),
        (b"<!DOCTYPE html><html>", "promised, the file has 21"),
        (struct.pack("<Q", 2**63) + b"{}", "promised"),
        (struct.pack("<Q", 90) + b"{}", "a header of 90 bytes is promised, the file has 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
    ids=["empty", "short", "a web page", "huge length", "length beyond the end", "pointer of Git LFS"],
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content, match):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_header(tmp_path / "x.safetensors")


def test_a_shorter_file_is_cut_off_and_a_longer_one_is_not(tmp_path):
    with pytest.raises(UserError, match="cut off"):
        read_header(write(tmp_path / "short.safetensors", {"a": ONE}, body=7))
    with pytest.raises(UserError, match="longer than its header says") as raised:
        read_header(write(tmp_path / "long.safetensors", {"a": ONE}, body=9))
    assert "cut off" not in str(raised.value)


def test_a_pipe_and_a_folder_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(UserError, match=f"{name}.safetensors is no file"):
            read_header(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("metadata", [{"ss_tag": {"cat": 3}}, {"ss_tag": 3}, {"ss_tag": None}, {"ss_tag": ["a"]}, [], "text", 3])
def test_metadata_that_is_no_text_is_refused_as_such_by_every_reader(tmp_path, metadata):
    file = write(tmp_path / "x.safetensors", {"__metadata__": metadata, "a": ONE})
    for read in (read_header, read_file, read_metadata, load_tensors):
        with pytest.raises(UserError, match="x.safetensors: its __metadata__"):
            read(file)


def test_what_the_library_writes_is_read_as_it_is(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"{kind}.weight": torch.ones(2, 3).to(kind) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0), "count": torch.tensor(3), "flag": torch.tensor([True])}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "ss_tag_frequency": '{"cat": 3}'})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {entry["dtype"] for entry in header.values()} <= set(BITS)
    assert read_metadata(tmp_path / "x.safetensors")["ss_tag_frequency"] == '{"cat": 3}'
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_tensors(tmp_path / "x.safetensors").items())
    assert read_header(write(tmp_path / "none.safetensors", {"__metadata__": None}, body=0)) == {}


SCALE = torch.ones(1)
PACKED = {
    "scaled fp8 of ComfyUI": {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
    "scaled fp8 of a part": {"model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
    "scale_weight": {"a.scale_weight": SCALE},
    "scale_input": {"a.scale_input": SCALE},
    "weight_scale": {"a.weight_scale": SCALE},
    "weight_scale_2": {"a.weight_scale_2": SCALE},
    "weight_scale_inv": {"a.weight_scale_inv": SCALE},
    "input_scale": {"a.input_scale": SCALE},
    "comfy_quant": {"a.comfy_quant": torch.zeros(4, dtype=torch.uint8)},
    "nf4 of bitsandbytes": {"a.weight.absmax": SCALE},
    "nested nf4": {"a.weight.nested_absmax": SCALE},
    "quant_map": {"a.weight.quant_map": SCALE},
    "quant_state": {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
    "int8 of bitsandbytes": {"a.SCB": SCALE},
    "GPTQ": {"a.qweight": torch.zeros(2, dtype=torch.int32)},
    "SVDQuant": {"a.wscales": SCALE},
    "quanto": {"a.weight._data": torch.zeros(2, dtype=torch.int8)},
    "compressed tensors": {"a.weight_packed": torch.zeros(2, dtype=torch.int32)},
    "int8 without a scale": {"b.weight": torch.zeros(2, 2, dtype=torch.int8)},
    "uint8 without a scale": {"b.weight": torch.zeros(2, 2, dtype=torch.uint8)},
    "an int8 bias": {"b.bias": torch.zeros(2, dtype=torch.int8)},
    "whole numbers": {"b.weight": torch.zeros(2, 2, dtype=torch.int64)},
    "complex numbers": {"b.weight": torch.zeros(2, 2, dtype=torch.complex64)},
}


UNDONE = ("scaled fp8 of ComfyUI", "scaled fp8 of a part", "scale_weight", "scale_input", "weight_scale", "input_scale")


@pytest.mark.parametrize("kind", PACKED)
def test_quantised_weights_are_refused_by_the_name_of_the_tensor(tmp_path, kind):
    """By readers of models those only that they cannot undo (see test_scaled_weights.py)."""
    file, marks = tmp_path / "x.safetensors", PACKED[kind]
    save_file({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)} | marks, file)
    for read in (read_header, load_tensors) if kind in UNDONE else (read_header, read_file, load_tensors):
        with pytest.raises(UserError, match=rf"x.safetensors holds quantised weights \({next(iter(marks))}"):
            read(file)


def test_quantised_weights_are_refused_by_the_note_in_the_metadata(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors", metadata={"_quantization_metadata": "{}"})
    with pytest.raises(UserError, match="_quantization_metadata"):
        read_header(tmp_path / "x.safetensors")


def test_names_of_plain_models_are_not_taken_for_scales(tmp_path):
    names = ["double_blocks.0.img_attn.norm.query_norm.scale", "logit_scale", "scale_shift_table", "norm.weight", "scaling_layer.scale"]
    names += ["text_encoders.t5xxl.scaled_fp8", "model_ema.num_updates"]  # of parts that are not read
    save_file({name: torch.ones(2) for name in names}, tmp_path / "x.safetensors")
    assert set(read_header(tmp_path / "x.safetensors")) == set(names)


@pytest.mark.parametrize("ids", [torch.arange(5)[None], torch.arange(5)[None].half(), torch.arange(5)[None] * 0.9, None])
def test_position_ids_of_any_form_are_no_weights(tmp_path, ids):
    kept = {"embeddings.weight": torch.ones(3)} | ({} if ids is None else {"text_model.embeddings.position_ids": ids})
    save_file(kept, tmp_path / "x.safetensors")
    found = read_file(tmp_path / "x.safetensors")
    assert [name for name, entry in found.items() if entry.is_float] == ["embeddings.weight"]
    assert {entry.dtype for entry in found.values()} <= {"float32", "I64"}


def test_whole_numbers_where_a_model_has_weights_are_refused():
    model = torch.nn.Module()
    model.register_parameter("token", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match="x: token holds whole numbers"):
        check_fit(model, {"token": torch.zeros(3, dtype=torch.int64)}, "x")
    check_fit(model, {"token": torch.zeros(3).half()}, "x")
