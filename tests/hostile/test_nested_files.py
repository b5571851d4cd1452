"""JSON that is nested deeper than a parser can go, or is of another kind, is no traceback, wherever it is read from."""

import json

import pytest
from PIL import Image, PngImagePlugin

from afa.errors import UserError
from afa.experts.vae import _read
from afa.explanation.run import _distance
from afa.fingerprint import NOTE, check_claim
from afa.images import CHUNK, read_made
from afa.merging.configs import _write_config
from afa.training.log import _step

NO_OBJECT = ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", '"text"', "", "{"]


@pytest.mark.parametrize("text", NO_OBJECT, ids=lambda text: text[:6])
def test_no_object_is_no_traceback(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        _write_config(file, tmp_path / "copy.json", "float16")
    with pytest.raises(UserError, match=r"vae\.safetensors: .*config\.json.*give the VAE's folder"):
        _read(tmp_path, tmp_path / "vae.safetensors")
    (tmp_path / NOTE).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        check_claim(tmp_path, {"seed": 1}, "the comparison")
    assert _step(text) == float("inf")
    assert _distance(file) is None
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=chunk)
    assert read_made(tmp_path / "a.png") == {}


@pytest.mark.parametrize("value", ["3", True, None, float("nan"), -1.0, 1e9, [], {}])
def test_a_distance_that_cannot_be_is_measured_again(tmp_path, value):
    (tmp_path / "a.skipped.json").write_text(json.dumps({"rmse": value}))
    assert _distance(tmp_path / "a.skipped.json") is None
    (tmp_path / "a.skipped.json").write_text(json.dumps({"rmse": 0.0}))
    assert _distance(tmp_path / "a.skipped.json") == 0.0
