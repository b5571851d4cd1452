"""Merges from files to files: streamed equals in memory, in every layout, with little memory, all or nothing."""

import functools
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from merging_models import (
    afa_merge,
    apart,
    apart_on_disk,
    saved,
    sdxl,
    settings,
    weights_of,
    write_experts,
)
from merging_models import sd as sd_of
from original_layout import write_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_merging_rules import MERGES
from tiny import ONE_LEVEL, SDXL_SMALL, quiet

from afa.errors import UserError
from afa.experts.load import load_expert
from afa.experts.single_file import load_tokenizers
from afa.merging.engine import merge_files, write
from afa.merging.memory import merge_pipelines
from afa.merging.plan import make_plan
from afa.merging.registry import find_merge
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader

sd = functools.partial(sd_of, **ONE_LEVEL)
OPTIONS = {"mbw": ["--weights", "GRAD_V"], "dare": ["--drop", "0.3", "--seed", "7"]}
IN_MEMORY = {"mbw": {"weights": "GRAD_V"}, "dare": {"drop": 0.3, "seed": 7}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("experts"), **ONE_LEVEL)


@pytest.fixture(scope="module")
def pipes():
    return [sd(seed) for seed in range(4)]


def read(path: Path, config: Path) -> StableDiffusionPipeline:
    """A merged folder or single file, as any program reads it with diffusers."""
    if path.is_dir():
        return StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
    return StableDiffusionPipeline.from_single_file(str(path), config=str(config), local_files_only=True, **load_tokenizers(config))


@pytest.mark.parametrize("method", MERGES)
def test_streaming_equals_in_memory(method, home, pipes, tmp_path):
    experts = ["a", "b", "c"][: 2 if method == "mbw" else find_merge(method).experts]
    based = find_merge(method).needs("base")
    base = ["--base", home / "base"] if based else []
    arguments = ["--method", method, "--experts", *(home / name for name in experts), *base, *OPTIONS.get(method, [])]
    assert afa_merge(*arguments, "--output", tmp_path / "merged") == 0
    expected = merge_pipelines(pipes[: len(experts)], method, base=pipes[3] if based else None, **IN_MEMORY.get(method, {}))
    assert apart_on_disk(tmp_path / "merged", expected) == 0
    assert apart(expected, pipes[0]) > 0.01


@pytest.mark.parametrize(
    ("names", "output"),
    [
        (("a.safetensors", "b"), "merged"),
        (("a", "b.safetensors"), "merged.safetensors"),
        (("a.safetensors", "b.safetensors"), "merged"),
        (("a", "b"), "merged.safetensors"),
    ],
)
def test_folders_and_single_files_mix_freely(names, output, home, pipes, tmp_path):
    """TIES ranks tensor by tensor: it would show if a tensor of one layout were read as another's."""
    merge_files(settings(home, tmp_path / output, *names, method="ties", base=str(home / "base.safetensors")))
    expected = merge_pipelines(pipes[:2], "ties", base=pipes[3])
    assert apart(read(tmp_path / output, home / "a"), expected) == 0


def test_a_merged_folder_is_a_pipeline_that_makes_pictures(home, tmp_path):
    merge_files(settings(home, tmp_path / "merged", "a", "b", "c"))
    pipe = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True))
    assert pipe("a tree", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(path.name for path in (home / "a").iterdir())


def test_a_merged_single_file_is_an_expert(home, tmp_path):
    merge_files(settings(home, tmp_path / "merged.safetensors", "a", "b"))
    expert = load_expert(tmp_path / "merged.safetensors", config=str(home / "a"))
    assert (expert.name, expert.family) == ("merged", "unet")
    assert expert.load_vae() is not None
    assert afa_merge("--experts", tmp_path / "merged.safetensors", home / "c", "--config", home / "a", "--output", tmp_path / "again") == 0


def test_sharded_folders_are_read_whole(home, tmp_path):
    shards = saved(sd(0), tmp_path / "shards", max_shard_size="100KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 2
    for name, first in (("whole", home / "a"), ("from_shards", shards)):
        merge_files(MergeSettings([str(first), str(home / "b")], str(tmp_path / name)))
    assert apart(read(tmp_path / "whole", home / "a"), read(tmp_path / "from_shards", home / "a")) == 0


def test_mapping_the_files_anew_on_the_way_changes_nothing(home, pipes, tmp_path, monkeypatch):
    monkeypatch.setattr("afa.experts.tensors.MAPPED", 10_000)
    merge_files(settings(home, tmp_path / "merged", "a", "b.safetensors"))
    assert apart(read(tmp_path / "merged", home / "a"), merge_pipelines(pipes[:2])) == 0


def test_a_bare_denoiser_is_merged_to_a_bare_denoiser(home, pipes, tmp_path):
    merge_files(MergeSettings([f"{name}={home / name}/unet" for name in "ab"], str(tmp_path / "merged"), method="slerp"))
    merged = load_expert(tmp_path / "merged").model.state_dict()
    expected = merge_pipelines(pipes[:2], "slerp").unet.state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [saved(sdxl(seed, **SDXL_SMALL), tmp_path_factory.mktemp("sdxl") / f"xl{seed}") for seed in range(2)]


@pytest.mark.parametrize("file", ["merged.safetensors", "merged"])
def test_sdxl_is_merged_in_both_layouts(file, pair, tmp_path):
    folders = pair
    merge_files(MergeSettings([str(folder) for folder in folders], str(tmp_path / file), method="mbw", weights=["WRAP12"]))
    if file == "merged":
        pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / file, local_files_only=True)
    else:
        options = {"config": str(folders[0]), "local_files_only": True, **load_tokenizers(folders[0])}
        pipe = StableDiffusionXLPipeline.from_single_file(str(tmp_path / file), **options)
        merge_files(MergeSettings([str(tmp_path / file)], str(tmp_path / "back"), config=str(folders[0])))
        assert apart(StableDiffusionXLPipeline.from_pretrained(tmp_path / "back", local_files_only=True), pipe) == 0
    assert apart(pipe, merge_pipelines([sdxl(seed, **SDXL_SMALL) for seed in range(2)], "mbw", weights="WRAP12")) == 0


def test_sd2_keeps_its_open_clip_names_and_what_is_not_used(tmp_path):
    """An OpenCLIP file has its last layer and projection besides; they stay, and the thirds of in_proj are joined in order."""
    pipe = sd(0)
    pipe.text_encoder.config.hidden_act = "gelu"
    folder = saved(pipe, tmp_path / "sd2")
    merge_files(MergeSettings([str(folder)], str(tmp_path / "file.safetensors")))
    tensors = load_file(tmp_path / "file.safetensors")
    third = tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    names = [f"encoder.layers.0.self_attn.{each}_proj.weight" for each in "qkv"]
    assert torch.equal(third, torch.cat([pipe.text_encoder.state_dict()[name] for name in names]))
    save_file({**tensors, "cond_stage_model.model.text_projection": torch.eye(24)}, tmp_path / "file.safetensors")
    merge_files(MergeSettings([str(tmp_path / "file.safetensors")], str(tmp_path / "again.safetensors"), config=str(folder)))
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == {*tensors, "cond_stage_model.model.text_projection"}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_merge_of_one_expert_is_that_expert(home, pipes, tmp_path):
    merge_files(settings(home, tmp_path / "same.safetensors", "a"))
    assert apart(read(tmp_path / "same.safetensors", home / "a"), pipes[0]) == 0
    assert load_file(tmp_path / "same.safetensors").keys() == load_file(home / "a.safetensors").keys()


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize(("dtype", "code"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), (None, "F32")])
def test_the_result_has_the_asked_dtype_else_the_first_experts(output, dtype, code, home, tmp_path):
    merge_files(settings(home, tmp_path / output, "a", "b", dtype=dtype))
    for file in [tmp_path / output] if output.endswith("s") else (tmp_path / output).glob("*/*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {code}  # noqa: SIM118


def test_half_precision_is_rounded_once(home, pipes, tmp_path):
    merge_files(settings(home, tmp_path / "merged", "a", "b", dtype="float16"))
    expected = merge_pipelines(pipes[:2])
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float16, local_files_only=True)
    mine, theirs = weights_of(merged), weights_of(expected)
    assert all(torch.equal(mine[key], theirs[key].half()) for key in mine)


def test_what_a_single_file_has_besides_stays_but_for_its_ema_copy(home, tmp_path):
    besides = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.linspace(1, 0, 1000),
    }
    ema = {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3)}
    save_file({**load_file(home / "a.safetensors"), **besides, **ema}, tmp_path / "more.safetensors")
    experts = [str(tmp_path / "more.safetensors"), str(home / "b.safetensors")]
    merge_files(MergeSettings(experts, str(tmp_path / "merged.safetensors"), config=str(home / "a"), dtype="float16"))
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in besides.items())
    assert merged.keys() == {*load_file(home / "a.safetensors"), *besides}


def test_whole_numbers_in_a_folder_are_kept_too(home, pipes, tmp_path):
    """Folders of older versions hold CLIP's position_ids, under names with another prefix."""
    old = saved(sd(0), tmp_path / "old")
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(old / "text_encoder/model.safetensors").items()}
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**tensors, **ids}, old / "text_encoder/model.safetensors", {"format": "pt"})
    merge_files(MergeSettings([str(old), str(home / "b")], str(tmp_path / "merged")))
    assert load_file(tmp_path / "merged/text_encoder/model.safetensors").keys() == {*tensors, *ids}
    assert apart(read(tmp_path / "merged", home / "a"), merge_pipelines(pipes[:2])) == 0
    merge_files(MergeSettings([str(old), str(home / "b")], str(tmp_path / "merged.safetensors")))
    assert "cond_stage_model.transformer.text_model.embeddings.position_ids" in load_file(tmp_path / "merged.safetensors")


def test_the_vae_is_the_firsts_unless_asked(home, pipes, tmp_path):
    for name, changes in {"first": {}, "named": {"vae": "b"}, "path": {"vae": str(home / "c/vae")}, "file": {"vae": str(home / "c.safetensors")}}.items():
        merge_files(settings(home, tmp_path / name, "a", "b", **changes))
        expected = pipes[{"first": 0, "named": 1, "path": 2, "file": 2}[name]]
        assert apart(read(tmp_path / name, home / "a"), expected, "vae.") == 0
    merge_files(settings(home, tmp_path / "merged", "a", "b", merge_vae=True))
    assert apart(read(tmp_path / "merged", home / "a"), merge_pipelines(pipes[:2], merge_vae=True)) == 0


def test_a_single_file_without_vae_stays_without_and_a_folder_needs_one(home, tmp_path):
    bare = str(write_single_file(sd(0), tmp_path / "bare.safetensors", vae=False))
    merge_files(MergeSettings([bare, str(home / "b")], str(tmp_path / "merged.safetensors"), config=str(home / "a")))
    assert not any(name.startswith("first_stage_model.") for name in load_file(tmp_path / "merged.safetensors"))
    with pytest.raises(UserError, match="'bare' has no VAE, and a pipeline's folder needs one"):
        make_plan(MergeSettings([bare, str(home / "b")], str(tmp_path / "merged"), config=str(home / "a")))
    chosen = MergeSettings([bare, str(home / "b")], str(tmp_path / "merged"), config=str(home / "a"), vae="b")
    merge_files(chosen)
    assert apart(read(tmp_path / "merged", home / "a"), sd(1), "vae.") == 0


def test_parts_that_are_the_same_in_all_are_read_once(home, tmp_path):
    shared = saved(sd(5, text_seed=0), tmp_path / "shared")
    facts = merge_files(MergeSettings([str(home / "a"), str(shared)], str(tmp_path / "merged")))
    assert facts["same_in_all"] == ["text_encoder"]
    assert apart(read(tmp_path / "merged", home / "a"), sd(0), "text_encoder.") == 0


class CountingReader(Reader):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0

    def read(self, stored):
        tensor = super().read(stored)
        size = tensor.numel() * tensor.element_size()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size):
        self.alive -= size


@pytest.mark.parametrize("experts", [["a", "b"], ["a", "b.safetensors", "c", "base", "d=a"]])
@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_only_one_keys_tensors_are_in_memory_however_many_experts(experts, output, home, tmp_path):
    texts = [f"{name.partition('=')[0]}={home / name.rpartition('=')[2]}" for name in experts]
    plan = make_plan(MergeSettings(texts, str(tmp_path / output), config=str(home / "a")))

    class Bar:
        def update(self):
            pass

    with CountingReader() as reader:
        write(plan, reader, {"format": "pt"}, Bar())
    largest = max(4 * stored.numbers for stored in plan.first.tensors.values())
    assert largest < reader.most <= len(experts) * largest
    assert reader.alive == 0


def test_the_tensors_of_a_recipe_of_steps_are_let_go_one_key_after_the_other(home, tmp_path):
    names = {name: str(home / name) for name in ("a", "b", "c")}
    (tmp_path / "merge.toml").write_text(
        '[[step]]\nname = "one"\nexperts = ["{a}", "{b}"]\n'
        '[[step]]\nname = "two"\nexperts = ["one", "{c}"]\n'
        '[[step]]\nexperts = ["one", "two"]\n'.format(**names)
    )
    plan = make_plan(MergeSettings(output=str(tmp_path / "merged"), recipe=str(tmp_path / "merge.toml")))

    class Bar:
        def update(self):
            pass

    with CountingReader() as reader:
        write(plan, reader, {"format": "pt"}, Bar())
    largest = max(4 * stored.numbers for stored in plan.first.tensors.values())
    assert largest < reader.most <= 3 * largest  # a and b are read once, though two steps use their merge
    assert reader.alive == 0
