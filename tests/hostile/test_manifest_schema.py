"""afa.json with any key of another kind: refused in one sentence that names the key, before anything of it is used."""

import json
from typing import Any

import pytest
from hostile import ASSETS, WRONG, afa, downloaded, edit, within

from afa.checkpoint.manifest import read_manifest
from afa.errors import UserError

TEXT = {"text", "empty", "path", "markup"}
WHOLE = {"int"}
NUMBER = {"int", "float"}
RIGHT: dict[str, set[str]] = {  # key -> the values of WRONG that may stand there
    "experts.0.source": {"text", "path", "markup"},
    "experts.0.commit": {"null"},  # a commit needs a hub id
    "experts.0.config": {"null", "text", "path", "markup"},
    "experts.0.loras": {"empty list"},
    "experts.0.files": {"empty dict"},
    "experts.0.prediction_type": TEXT | {"null"},
    "frame": {"empty dict"},
    "frame.vae": {"text", "path", "markup"},
    "placement": TEXT,
    "placement.0": set(),
    "stages.0.channels": WHOLE,
    "stages.0.level": WHOLE,
    "stages.0.fused": {"bool"},
    "aggregator.options": {"empty dict"},
    "aggregator.options.hidden": WHOLE,
    "aggregator.options.heads": WHOLE,
    "aggregator.options.depth": WHOLE,
    "aggregator.attention_up_to": WHOLE | {"null"},
    "aggregator.parameters": WHOLE,
    "training": {"null", "empty dict", "dict"},
    "training.settings": {"empty dict", "dict"},
    "training.settings.lr": NUMBER | {"negative"},
    "training.settings.steps": WHOLE | {"negative"},
    "training.settings.reward": TEXT | {"null"},
    "training.settings.experts": {"null", "empty list"},
    "training.settings.flip": {"bool"},
    "training.steps": WHOLE,
    "training.seconds": NUMBER,
    "training.best_expert": TEXT,
    "training.torch": TEXT,
    "training.held_out_loss": set(),
    "training.held_out_loss.trained": set(),
    "training.held_out_loss.trained.value": NUMBER | {"negative", "nan"},
    "training.difference_to_best_expert": set(),
    "training.history": {"empty list"},
    "training.history.0": {"empty dict", "dict"},
    "training.history.0.step": WHOLE,
    "afa_version": TEXT,
    **{key: set() for key in ("family", "experts", "experts.0", "stages", "stages.0", "aggregator", "aggregator.kind", "aggregator.sha256", "format")},
    "experts.0.name": {"text"},
    "stages.0.name": set(),
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return downloaded(tmp_path_factory.mktemp("schema")) / "afa.json"


def mutated(manifest, key: str, value: Any) -> None:
    manifest.write_bytes((ASSETS / "ensemble" / "afa.json").read_bytes())
    edit(manifest, *(int(step) if step.isdigit() else step for step in key.split(".")), value=value)


@pytest.mark.parametrize("key", RIGHT)
def test_any_value_of_another_kind_is_refused_with_its_key(manifest, key):
    for wrong, value in WRONG.items():
        if key == "placement.0":
            mutated(manifest, "placement", [value])
        else:
            mutated(manifest, key, value)
        if wrong in RIGHT[key]:
            read_manifest(manifest.parent)
            continue
        with within(5), pytest.raises(UserError) as error:
            read_manifest(manifest.parent)
            pytest.fail(f"{key} = {wrong} was taken")
        message = str(error.value)
        assert "afa.json" in message and message.isprintable() and len(message) < 500
        parts = [part for part in key.split(".") if not part.isdigit()]
        assert any(part in message for part in (*parts, "JSON", "NUL", "surrogate")), (wrong, message)


@pytest.mark.parametrize("key", ["family", "experts", "frame", "placement", "stages", "aggregator"])
def test_a_key_that_is_missing_is_named(manifest, key):
    mutated(manifest, "afa_version", "0")
    data = json.loads(manifest.read_text())
    del data[key]
    manifest.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{key} is missing"):
        read_manifest(manifest.parent)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("experts.1.name", "curves", "twice"),
        ("stages.1.name", "IN00", "twice"),
        ("frame.pipeline", "curves", "there is no part 'pipeline'"),
        ("frame.__class__", "curves", "there is no part"),
        ("placement", ["IN00", "NO99"], "placement and stages"),
        ("aggregator.kind", "mean2", "mean2"),
        ("aggregator.options.width", 3, "no option .width"),
        ("aggregator.options.experts", 3, "no option .experts"),
        ("aggregator.options.hidden", 10**9, "hidden 1000000000"),
        ("aggregator.options.depth", 10**6, "depth"),
        ("aggregator.options.ignore", ["text", 3], r"ignore\[1\]"),
        ("family", "unet2", "unet2"),
        ("experts.0.commit", "../../x", "commit"),
        ("experts.0.loras", [{"path": "a"}], r"loras\[0\]\.strength is missing"),
        ("experts.0.loras", [{"path": "a", "strength": 1e300}], r"loras\[0\]\.strength"),
        ("experts.0.files", {"a": "b"}, "files.a"),
        ("training.held_out_loss", {"x": {"value": 1, "low": 1, "high": 1}}, "no trained"),
        ("extra", 1, "not known"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(manifest, key, value, says):
    mutated(manifest, key, value)
    with pytest.raises(UserError, match=says):
        read_manifest(manifest.parent)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe", b"{", b"[" * 100_000, b'{"format": 1e999}', b'{"format": "1"}', b"\0" * 64])
def test_a_file_that_is_no_manifest_is_refused(manifest, content):
    mutated(manifest, "afa_version", "0")
    manifest.write_bytes(content)
    with within(5), pytest.raises(UserError, match=r"afa\.json"):
        read_manifest(manifest.parent)


@pytest.mark.parametrize(("key", "value"), [("aggregator.parameters", 7), ("aggregator.options.hidden", 16384), ("stages.3.fused", False)])
def test_sizes_that_the_file_does_not_have_are_refused_before_experts_are_read(manifest, key, value, tmp_path):
    mutated(manifest, key, value)
    (manifest.parent.parent / "curves").rename(tmp_path / "curves")  # would be noticed first, if experts were looked for
    try:
        run = afa("generate", manifest.parent, "--prompt", "x", "--steps", 1, "--output", tmp_path / "out", "--device", "cpu")
    finally:
        (tmp_path / "curves").rename(manifest.parent.parent / "curves")
    assert run.refused and "aggregators.safetensors" in run.err, run.err


def test_the_embedded_manifest_is_read(manifest):
    mutated(manifest, "afa_version", "0")
    assert len(read_manifest(manifest.parent).experts) == 3
