"""Experts in GGUF files: the weights they were made of, blocks of a few bits undone by llama.cpp's package; broken files in one sentence."""

import struct

import numpy as np
import pytest
import torch
from gguf_writing import header, info, write_gguf
from original_layout import write_single_file
from original_transformers import originals
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import SD3_SMALL, sd3_pipeline, sd3_transformer

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.experts.description import describe_config, describe_expert
from afa.experts.dtypes import GGUF_BLOCKS
from afa.experts.headers import read_file
from afa.experts.load import load_expert
from afa.experts.spec import ExpertSpec
from afa.experts.tensors import TensorReader
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Whole pipelines as folders, which lend configs."""
    root = tmp_path_factory.mktemp("whole")
    sd3_pipeline(0, **SD3_SMALL).save_pretrained(root / "sd3")
    pipe = sd_pipeline(0, **ONE_LEVEL)
    pipe.save_pretrained(root / "sd")
    write_single_file(pipe, root / "sd.safetensors")
    return root


@pytest.fixture(scope="module")
def tensors():
    """A transformer under the publisher's names."""
    return dict(originals("sd3", dict(sd3_transformer(1, **SD3_SMALL).state_dict())))


def read(file):
    with TensorReader() as reader:
        return {name: reader.tensor(entry) for name, entry in read_file(file).items()}


def same_weights(one, other):
    wanted = other.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transformer_in_plain_types_is_read_to_the_bit(prefix, kind, home, tensors, tmp_path):
    converted = {f"{prefix}{name}": tensor.to(kind) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, tmp_path / "x.safetensors")
    file, config = write_gguf(tmp_path / "x.gguf", converted), str(home / "sd3")
    for dtype in (torch.float32, torch.bfloat16):
        assert same_weights(load_expert(str(file), dtype, config).model, load_expert(str(tmp_path / "x.safetensors"), dtype, config).model)


@pytest.mark.parametrize("alone", [True, False])
def test_a_u_net_alone_and_a_whole_checkpoint_are_read_to_the_bit(alone, home, tmp_path):
    whole = load_file(home / "sd.safetensors")
    file = write_gguf(tmp_path / "x.gguf", {name: tensor for name, tensor in whole.items() if not alone or name.startswith(PREFIX)})
    expert, folder = load_expert(str(file), config=str(home / "sd")), load_expert(str(home / "sd"))
    assert same_weights(expert.model, folder.model)
    assert len(expert.text_encoders) == (0 if alone else 1)
    assert all(same_weights(mine, theirs) for mine, theirs in zip(expert.text_encoders, folder.text_encoders, strict=False))


def test_rows_that_were_cut_get_their_shape_back(tmp_path):
    """As ComfyUI-GGUF cuts what its blocks do not fit."""
    weight = torch.randn(6, 4, 3, 3)
    file = write_gguf(tmp_path / "x.gguf", {"a.weight": weight.reshape(18, 12)}, {"comfy.gguf.orig_shape.a.weight": [6, 4, 3, 3]})
    assert torch.equal(read(file)["a.weight"], weight)


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_tensors_begin_where_the_header_aligns_them(alignment, tmp_path):
    given = {f"{size}.weight": torch.randn(size) for size in (3, 1, 17)}
    file = write_gguf(tmp_path / "x.gguf", given, {"general.alignment": alignment}, alignment)
    assert all(torch.equal(tensor, given[name]) for name, tensor in read(file).items())


def test_an_ensemble_keeps_it_and_a_merge_reads_it(home, tensors, tmp_path):
    file = write_gguf(tmp_path / "tuned.gguf", tensors)
    ensemble = Ensemble.from_experts([str(home / "sd3"), str(file)], config=str(home / "sd3"), aggregator="mean")
    assert list(ensemble.names) == ["sd3", "tuned"]
    for bundle in (False, True):
        ensemble.save(tmp_path / f"saved{bundle}", bundle=bundle)
        assert same_weights(Ensemble.load(tmp_path / f"saved{bundle}").experts[1].model, ensemble.experts[1].model)
    merge_files(MergeSettings([f"x={file}", f"y={file}"], str(tmp_path / "merged.safetensors"), config=str(home / "sd3")))
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items()) and merged.keys() == tensors.keys()


@pytest.mark.parametrize(("kind", "config"), [("sd3", "sd35"), ("flux", "flux-schnell")])
def test_real_transformers_are_recognised_and_complete(kind, config, tmp_path):
    """All names and shapes of a published model, and no content on the disk."""
    infos, end = [], 0
    for name, tensor in originals(kind, dict(describe_config("real", config).expert.model.state_dict())):
        infos.append(info(name, tuple(tensor.shape), 30, end))
        end += -(-2 * tensor.numel() // 32) * 32
    begin = header(infos, {})
    with (tmp_path / "real.gguf").open("wb") as stream:
        stream.write(begin)
        stream.truncate(len(begin) + 32 + end)
    found = describe_expert(ExpertSpec.parse(str(tmp_path / "real.gguf")))
    assert (found.config, found.denoiser.dtype, found.name) == (config, "bfloat16", "real")


class TestBlocks:
    """Files by llama.cpp's own writer, where the package is installed."""

    @pytest.fixture(scope="class")
    def gguf(self):
        return pytest.importorskip("gguf")

    def write(self, gguf, path, tensors, kind):
        """Write as ComfyUI-GGUF does: matrices in blocks, cut into rows of 256; all else in F32. Returns what is in the blocks."""
        number, per, size = GGUF_BLOCKS[kind]
        qtype, wanted = gguf.GGMLQuantizationType(number), {}
        assert gguf.GGML_QUANT_SIZES[qtype] == (per, size)
        writer = gguf.GGUFWriter(path, "sd3")
        generator = np.random.default_rng(0)
        for name, tensor in tensors.items():
            wanted[name] = tensor
            if tensor.ndim < 2 or tensor.numel() % 256:
                writer.add_tensor(name, tensor.float().numpy())
                continue
            rows = tensor.float().numpy().reshape(-1, 256)
            try:
                data = gguf.quants.quantize(rows, qtype)
            except NotImplementedError:  # only llama.cpp itself makes these
                data = generator.integers(0, 256, (len(rows), 256 // per * size), dtype=np.uint8)
                data &= 0x1F  # no scale becomes infinite
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            writer.add_tensor(name, data, raw_dtype=qtype)
            wanted[name] = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy()).reshape(tensor.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return wanted

    def test_plain_types_of_its_own_writer_are_read_to_the_bit(self, gguf, tensors, tmp_path):
        writer, kinds = gguf.GGUFWriter(tmp_path / "x.gguf", "flux"), (torch.float32, torch.float16, torch.bfloat16)
        wanted = {name: tensor.to(kinds[place % 3]) for place, (name, tensor) in enumerate(tensors.items())}
        for name, tensor in wanted.items():
            if tensor.dtype == torch.bfloat16:
                writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = read(tmp_path / "x.gguf")
        assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items())

    @pytest.mark.parametrize("kind", GGUF_BLOCKS)
    def test_every_kind_is_undone_as_the_package_does(self, gguf, kind, home, tensors, tmp_path):
        wanted = self.write(gguf, tmp_path / "x.gguf", tensors, kind)
        found = read(tmp_path / "x.gguf")
        assert all(torch.equal(found[name], tensor) and found[name].dtype == torch.float32 for name, tensor in wanted.items())

    @pytest.mark.parametrize(("kind", "loss"), [("Q8_0", 1 / 127), ("Q5_1", 1 / 15), ("Q4_0", 1 / 7)])
    def test_an_expert_and_a_merge_are_the_original_within_the_rounding(self, gguf, kind, loss, home, tensors, tmp_path):
        wanted = self.write(gguf, tmp_path / "x.gguf", tensors, kind)
        save_file({name: tensor.contiguous() for name, tensor in wanted.items()}, tmp_path / "x.safetensors")
        file, config = str(tmp_path / "x.gguf"), str(home / "sd3")
        for dtype in (torch.float32, torch.bfloat16):
            assert same_weights(load_expert(file, dtype, config).model, load_expert(str(tmp_path / "x.safetensors"), dtype, config).model)
        merge_files(MergeSettings([f"x={file}", f"y={file}"], str(tmp_path / "m.safetensors"), config=config))
        merged = load_file(tmp_path / "m.safetensors")
        assert all(torch.equal(merged[name], tensor.to(merged[name].dtype)) for name, tensor in wanted.items())
        assert all((tensor - tensors[name]).abs().max() <= loss * tensors[name].abs().max() for name, tensor in wanted.items())

    def test_the_package_is_asked_for_where_it_is_missing(self, monkeypatch, tmp_path):
        monkeypatch.setattr("afa.experts.gguf_files.find_spec", lambda name: None)
        begin = header([info("joint_blocks.0.x_block.attn.qkv.weight", (1, 32), 8, 0)], {})
        (tmp_path / "x.gguf").write_bytes(begin + bytes(-len(begin) % 32) + bytes(34))
        with pytest.raises(UserError, match=r"blocks \(Q8_0\).*pip install"):
            read_file(tmp_path / "x.gguf")


def one(shape=(2, 2), number=0, offset=0, fields=None, name="a.weight", version=3):
    begin = header([info(name, shape, number, offset)], fields or {}, version)
    return begin + bytes(-len(begin) % 32) + bytes(16)


def entry(code, *values):
    """A file whose one entry has such a value."""
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Qc" + code, 1, b"a", *values) + bytes(64)


GOOD = one()
BROKEN = {
    "empty": (b"", "cut off"),
    "another format": (b"PK\x03\x04" + GOOD[4:], "does not begin"),
    "version 1": (one(version=1), "version is 1"),
    "big-endian": (GOOD[:4] + b"\0\0\0\3" + GOOD[8:], "version"),
    "no tensors": (header([], {"general.architecture": "flux"}), "no tensors"),
    "tensors without end": (GOOD[:8] + struct.pack("<Q", 2**62) + GOOD[16:], "promises"),
    "entries without end": (GOOD[:16] + struct.pack("<Q", 2**62) + GOOD[24:], "promises"),
    "a name without end": (GOOD[:24] + struct.pack("<Q", 2**62) + GOOD[32:], "cut off"),
    "a name that is no text": (GOOD[:32] + b"\xff" + GOOD[33:], "utf-8"),
    "an unknown type": (one(number=77), "unknown type 77"),
    "a type of the future with blocks": (one(number=39), "unknown type 39"),
    "absurd sizes": (one(shape=(2**40, 2**40)), "ends at byte"),
    "many dimensions": (one(shape=(1,) * 60), "60 dimensions"),
    "rows that blocks do not fit": (one(shape=(2, 33), number=8), "rows of 33"),
    "a place outside": (one(offset=2**50), "ends at byte"),
    "two of one name": (header([info("a", (1,), 0, 0)] * 2, {}) + bytes(64), "twice"),
    "alignment 0": (one(fields={"general.alignment": 0}), "alignment is 0"),
    "absurd alignment": (one(fields={"general.alignment": 2**31}), "alignment"),
    "another shape before": (one(fields={"comfy.gguf.orig_shape.a.weight": [3, 3]}), "was of shape"),
    "a negative shape before": (one(fields={"comfy.gguf.orig_shape.a.weight": [-2, -2]}), "was of shape"),
    "a shape that is a text": (one(fields={"comfy.gguf.orig_shape.a.weight": "2"}), "was of shape"),
    "an unknown value": (entry("I", 50), "unknown type 50"),
    "an array without end": (entry("IIQ", 9, 4, 2**60), "cut off"),
    "texts without end": (entry("IIQ", 9, 8, 2**60), "texts"),
    "arrays within arrays": (entry("IIQ", 9, 9, 1), "unknown type 9"),
}


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_sentence(content, why, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=rf"x.gguf is not a readable GGUF file \(.*({why})") as refused:
        read_file(tmp_path / "x.gguf")
    assert "\n" not in str(refused.value)


def test_a_file_cut_anywhere_is_one_sentence(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", {"a.weight": torch.ones(8), "b.weight": torch.ones(8)}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable GGUF file"):
            read_file(tmp_path / "x.gguf")


@pytest.mark.parametrize("content", [b"", GOOD, one(name="blk.0.attn_q.weight")])
def test_what_is_no_expert_ends_with_exit_code_2(content, tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(content)
    assert main(["inspect", str(tmp_path / "x.gguf")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_language_model_is_named_as_a_text_encoder(tmp_path):
    (tmp_path / "x.gguf").write_bytes(one(name="blk.0.attn_q.weight"))
    with pytest.raises(UserError, match="text encoder"):
        describe_expert(ExpertSpec.parse(str(tmp_path / "x.gguf")))
