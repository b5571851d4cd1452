"""Merges of SD3 and FLUX.1 folders: every method, streamed as in memory, with block weights by the families' own stages."""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from merging_models import PIPELINES, afa_merge, apart, apart_on_disk, flux, saved, sd, sd3, weights_of
from safetensors.torch import load_file, save_file
from test_merging_rules import MERGES
from tiny import quiet

from afa.errors import UserError
from afa.experts.load import load_expert
from afa.experts.spec import ExpertSpec
from afa.experts.transformer_names import TRANSFORMERS
from afa.merging.engine import merge_files
from afa.merging.memory import merge_pipelines
from afa.merging.plan import make_plan
from afa.merging.registry import find_merge
from afa.merging.settings import MergeSettings
from afa.merging.sources import open_source

CLASSES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
FAMILIES = list(CLASSES)
WEIGHTS = {"sd3": "0,1,0.5,0.25,0.1", "flux": "0,1,0.5,0.25,0.1,0.9"}  # J00 … J03, OUT; D00 D01 S00 … S02, OUT
OPTIONS = {"dare": {"drop": 0.3, "seed": 7}}
NAMES = ["a", "b", "c", "base"]
# Rules see one tensor at a time: every method is tried with SD 3, and with FLUX.1 those that ask for its stages, keys or base.
METHODS = [*(("sd3", method) for method in MERGES), *(("flux", method) for method in ("weighted", "mbw", "dare"))]


@functools.cache
def made(family: str, seed: int):
    """A pipeline with text encoders of its own, which no test changes."""
    return PIPELINES[family](seed, text_seed=seed)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three experts of each family and their base, every one with text encoders of its own."""
    home = tmp_path_factory.mktemp("experts")
    for family in FAMILIES:
        for seed, name in enumerate(NAMES):
            saved(made(family, seed), home / family / name)
    return home


def merge(home: Path, output: Path, family: str, *names: str, **options) -> dict:
    return merge_files(MergeSettings([str(home / family / name) for name in names], str(output), **options))


def read(family: str, folder: Path):
    return CLASSES[family].from_pretrained(folder, local_files_only=True)


def in_memory(family: str, count: int, method: str, **options):
    pipes = [made(family, seed) for seed in range(count)]
    base = made(family, 3) if find_merge(method).needs("base") else None
    return merge_pipelines(pipes, method, base=base, **options)


@pytest.mark.parametrize(("family", "method"), METHODS)
def test_streaming_equals_in_memory(family, method, home, tmp_path):
    names = ["a", "b"] if method == "mbw" or find_merge(method).experts == 2 else ["a", "b", "c"]
    base = {"base": str(home / family / "base")} if find_merge(method).needs("base") else {}
    weights = {"weights": [WEIGHTS[family]]} if method == "mbw" else {}
    merge(home, tmp_path / "merged", family, *names, method=method, **base, **weights, **OPTIONS.get(method, {}))
    given = {"weights": WEIGHTS[family]} if method == "mbw" else OPTIONS.get(method, {})
    expected = in_memory(family, len(names), method, **given)
    assert apart_on_disk(tmp_path / "merged", expected) == 0
    assert apart(expected, made(family, 0)) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_of_weight_one_is_the_seconds_and_the_rest_the_firsts(family, home, tmp_path):
    stage, place = {"sd3": ("J01", "transformer_blocks.1."), "flux": ("S02", "single_transformer_blocks.2.")}[family]
    (tmp_path / "weights.toml").write_text(f"others = 0\n{stage} = 1\n")
    merge(home, tmp_path / "merged", family, "a", "b", method="mbw", weights=[str(tmp_path / "weights.toml")])
    merged, first, second = (
        load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (tmp_path / "merged", *(home / family / name for name in "ab"))
    )
    assert any(name.startswith(place) for name in merged)
    assert all(torch.equal(tensor, (second if name.startswith(place) else first)[name]) for name, tensor in merged.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_and_a_single_one_are_themselves(family, home, tmp_path):
    expert = home / family / "a"
    merge_files(MergeSettings([str(expert)], str(tmp_path / "one")))
    merge_files(MergeSettings([str(expert), f"again={expert}"], str(tmp_path / "equal"), method="mbw", weights=[WEIGHTS[family]]))
    for name in ("one", "equal"):
        assert apart(read(family, tmp_path / name), made(family, 0)) == 0


def test_sharded_folders_are_read_whole(home, tmp_path):
    shards = saved(flux(0, text_seed=0), tmp_path / "a", max_shard_size="20KB")
    for part in ("transformer", "text_encoder_2"):
        assert len(list((shards / part).glob("*.safetensors"))) > 1
    merge_files(MergeSettings([str(shards), str(home / "flux/b")], str(tmp_path / "from_shards")))
    assert apart(read("flux", tmp_path / "from_shards"), in_memory("flux", 2, "weighted")) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_denoiser_is_merged_to_a_bare_denoiser(family, home, tmp_path):
    names = [f"{name}={home / family / name / 'transformer'}" for name in "ab"]
    merge_files(MergeSettings(names, str(tmp_path / "merged"), method="mbw", weights=[WEIGHTS[family]]))
    merged = load_expert(tmp_path / "merged").model.state_dict()
    expected = in_memory(family, 2, "mbw", weights=WEIGHTS[family]).transformer.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_frozen_text_encoders_are_read_once(tmp_path, capsys):
    folders = [saved(sd3(seed), tmp_path / f"expert{seed}") for seed in range(2)]
    assert afa_merge("--experts", *folders, "--output", tmp_path / "merged") == 0
    assert "Equal in all experts: text_encoder, text_encoder_2, text_encoder_3." in capsys.readouterr().out
    assert apart(read("sd3", tmp_path / "merged"), merge_pipelines([sd3(0), sd3(1)])) == 0


def test_a_pipeline_without_t5_is_merged_without_it(tmp_path):
    folders = []
    for seed in range(2):
        pipe = sd3(seed, text_seed=seed)
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        folders.append(saved(pipe, tmp_path / f"expert{seed}"))
    merge_files(MergeSettings([str(folder) for folder in folders], str(tmp_path / "merged")))
    merged = CLASSES["sd3"].from_pretrained(tmp_path / "merged", local_files_only=True, text_encoder_3=None, tokenizer_3=None)
    assert "text_encoder_3" not in {key.partition(".")[0] for key in weights_of(merged)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_is_a_pipeline_that_makes_pictures(family, home, tmp_path):
    merge(home, tmp_path / "merged", family, "a", "b", method="slerp")
    pipe = quiet(read(family, tmp_path / "merged"))
    assert pipe("a cat", num_inference_steps=1, height=64, width=64, max_sequence_length=16).images[0].size == (64, 64)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(path.name for path in (home / family / "a").iterdir())


def test_embeddings_that_t5_ties_are_one_tensor_under_whichever_name_a_file_has_them(home, tmp_path):
    """Some files hold shared.weight, some encoder.embed_tokens.weight, some both."""
    for name in ("b", "c"):
        part = saved(flux(NAMES.index(name), text_seed=NAMES.index(name)), tmp_path / name) / "text_encoder_2/model.safetensors"
        tensors = load_file(part)
        shared = {"shared.weight": tensors["shared.weight"].clone()} if name == "c" else {}
        assert "encoder.embed_tokens.weight" not in tensors
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        save_file({**tensors, **shared}, part, {"format": "pt"})
    experts = [str(home / "flux/a"), str(tmp_path / "b"), str(tmp_path / "c")]
    for first in range(3):
        turned = [*experts[first:], *experts[:first]]
        merge_files(MergeSettings(turned, str(tmp_path / f"merged{first}")))
    assert apart(read("flux", tmp_path / "merged0"), in_memory("flux", 3, "weighted")) == 0
    embeddings = [read("flux", tmp_path / f"merged{first}").text_encoder_2.shared.weight for first in range(3)]
    assert all(torch.allclose(each, embeddings[0], atol=1e-6) for each in embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vae_is_the_firsts_unless_asked(family, home, tmp_path):
    merge(home, tmp_path / "first", family, "a", "b")
    merge(home, tmp_path / "named", family, "a", "b", vae="b")
    for name, seed in (("first", 0), ("named", 1)):
        assert apart(read(family, tmp_path / name), made(family, seed), "vae.") == 0


def test_a_merged_transformer_says_how_it_was_made(home, tmp_path):
    merge(home, tmp_path / "merged", "sd3", "a", "b", method="mbw", weights=[WEIGHTS["sd3"]])
    from safetensors import safe_open

    with safe_open(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["afa.merge"])
    assert recipe["options"]["weights"] == {"base": [1, 0], "J00": [1, 0], "J01": [0, 1], "J02": [0.5, 0.5], "J03": [0.75, 0.25], "OUT": [0.9, 0.1]}


@pytest.mark.parametrize(
    ("family", "arguments", "sentence"),
    [
        ("sd3", ["a", "{flux}/b"], "'b' cannot join 'a': it is of family flux, expected sd3"),
        ("sd3", ["a", "x={sd3}/b/transformer"], "'x' cannot join 'a': it has 0 text encoders, expected 3"),
        ("sd3", ["a", "b", "--output", "m.safetensors"], "the text_encoder of 'b' is another than that of 'a', and the file of a transformer holds only"),
        ("sd3", ["a", "a2=a", "--vae", "b", "--output", "m.safetensors"], "--vae b: the file of a transformer holds only the transformer"),
        ("sd3", ["a", "a2=a", "--merge-vae", "--output", "m.safetensors"], "--merge-vae: the file of a transformer holds only the transformer"),
        ("sd3", ["a", "b", "--method", "mbw", "--weights", "GRAD_V"], "preset GRAD_V is for the stages of a U-Net"),
        ("sd3", ["a", "b", "--method", "mbw", "--weights", "0.5"], "1 block weights, expected 5 (J00 … OUT) or 6 (base in front of them)"),
        ("flux", ["a", "{sd3}/b"], "'b' cannot join 'a': it is of family sd3, expected flux"),
        ("flux", ["a", "b", "--method", "mbw", "--weights", "block.toml"], "there is no stage 'block.0'"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_sentence(family, arguments, sentence, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home / family)
    (home / family / "block.toml").write_text('others = 0.5\n"block.0" = 1\n')
    places = {each: str(home / each) for each in FAMILIES}
    arguments = [argument.format(**places) for argument in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "merged")]
    assert afa_merge("--experts", *arguments, *output) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_differs_is_named_with_both(home, tmp_path):
    other = saved(sd3(1, text_seed=1, pos_embed_max_size=8), tmp_path / "other")
    with pytest.raises(UserError, match=r"transformer\.pos_embed\.pos_embed has shape \(1, 64, 32\), expected \(1, 256, 32\)"):
        make_plan(MergeSettings([str(home / "sd3/a"), str(other)], str(tmp_path / "merged")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_of_a_transformer_that_is_incomplete_is_refused(family, home, tmp_path):
    names = {"sd3": TRANSFORMERS[0].marks, "flux": TRANSFORMERS[2].marks}[family]
    save_file({f"model.diffusion_model.{name}": torch.zeros(4, 4) for name in names}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"file\.safetensors.* is incomplete or of another architecture") as refusal:
        open_source(ExpertSpec.parse(str(tmp_path / "file.safetensors")), str(home / family / "a"))
    assert "\n" not in str(refusal.value)


def test_a_missing_weight_of_a_transformer_is_found_before_anything_is_written(home, tmp_path):
    other = saved(flux(1, text_seed=1), tmp_path / "other")
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["single_transformer_blocks.1.proj_mlp.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of \d+ weights \(first: single_transformer_blocks\.1\.proj_mlp\.weight\)"):
        make_plan(MergeSettings([str(home / "flux/a"), str(other)], str(tmp_path / "merged")))


def test_a_transformer_and_a_unet_do_not_merge(home, tmp_path):
    unet = saved(sd(0), tmp_path / "unet")
    with pytest.raises(UserError, match="it is of family unet, expected flux"):
        make_plan(MergeSettings([str(home / "flux/a"), str(unet)], str(tmp_path / "merged")))
