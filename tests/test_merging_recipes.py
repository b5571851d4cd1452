"""What a merge reads beside plain checkpoints: LoRAs, single files of transformers, earlier steps; and making it again."""

import json
import re
from pathlib import Path
from typing import Annotated

import pytest
import torch
from merging_models import apart, saved, sd, sd3, settings, write_experts
from original_transformers import write_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_loras import write_kohya, write_lora
from tiny_transformers import qwen_image_pipeline, sd3_transformer

from afa.cli.main import main
from afa.evaluation.names import known_methods
from afa.experts.load import load_expert, load_experts
from afa.experts.spec import ExpertSpec
from afa.files import sha256
from afa.merging import rules
from afa.merging.engine import merge_files
from afa.merging.memory import merge_experts, merge_pipelines
from afa.merging.plan import make_plan
from afa.merging.registry import MERGES
from afa.merging.rules import Merge
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader, open_source


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = write_experts(tmp_path_factory.mktemp("experts"))
    write_lora("sd", home / "style.safetensors", seed=1, text=True)
    write_kohya("sd", home / "kohya.safetensors", seed=2, alpha=0.5)
    return home


def same_weights(source, expert) -> bool:
    """Whether a source reads exactly what the loaded expert has."""
    models = {"unet": expert.model, **{f"text_encoder{n or ''}": one for n, one in enumerate(expert.text_encoders)}}
    with Reader() as reader:
        return all(
            torch.equal(source.read(key, reader), models[key.partition(".")[0]].state_dict()[key.partition(".")[2]])
            for key, stored in source.tensors.items()
            if stored.is_float and not key.startswith("vae.")
        )


# ---- LoRAs


@pytest.mark.parametrize("place", ["a+style.safetensors*0.8", "a+kohya.safetensors*-0.5", "a.safetensors+style.safetensors*0.5+kohya.safetensors"])
def test_an_expert_with_loras_is_read_exactly_as_it_is_loaded(place, home, monkeypatch):
    monkeypatch.chdir(home)
    spec = ExpertSpec.parse(place)
    source, expert = open_source(spec, "a"), load_expert(spec, config="a")
    assert source.loras
    assert same_weights(source, expert)


def test_a_dora_and_a_bias_are_folded_in_as_they_are_loaded(home, monkeypatch):
    monkeypatch.chdir(home)
    write_lora("sd", home / "dora.safetensors", seed=3, use_dora=True)
    rows, channels, *kernel = sd(0).unet.conv_in.weight.shape
    factors = {"lora_A.weight": torch.randn(2, channels, *kernel), "lora_B.weight": torch.randn(rows, 2, 1, 1), "lora_B.bias": torch.randn(rows)}
    save_file({f"unet.conv_in.{end}": tensor for end, tensor in factors.items()}, home / "biased.safetensors")
    for name in ("dora", "biased"):
        spec = ExpertSpec.parse(f"a+{name}.safetensors*0.7")
        assert same_weights(open_source(spec), load_expert(spec))


def test_a_merge_of_files_with_a_lora_is_the_merge_of_the_loaded_experts(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    specs = ["photo=a+style.safetensors*0.8", "b.safetensors"]
    merge_files(MergeSettings(specs, str(tmp_path / "merged"), method="ties", base="base", config="a"))
    merged = load_expert(tmp_path / "merged")
    expected = merge_experts(load_experts(specs, config="a"), "ties", base=load_expert("base"))
    assert all(torch.equal(one, other) for one, other in zip(merged.model.parameters(), expected.model.parameters(), strict=True))
    (text,), (wanted,) = merged.text_encoders, expected.text_encoders
    assert all(torch.equal(one, other) for one, other in zip(text.parameters(), wanted.parameters(), strict=True))


def test_a_lora_in_half_precision_keeps_the_files_type_and_is_computed_in_single(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    merge_files(MergeSettings(["a"], str(tmp_path / "half"), dtype="float16"))
    merge_files(MergeSettings([f"{tmp_path / 'half'}+style.safetensors"], str(tmp_path / "merged")))
    expected = load_expert(f"{tmp_path / 'half'}+style.safetensors").model.state_dict()
    merged = load_file(tmp_path / "merged/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name].half()) for name, tensor in merged.items())


# ---- single files of transformers, and Qwen-Image


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """Two SD3 transformers as single files, and the pipeline whose configs they are read with."""
    home = tmp_path_factory.mktemp("transformers")
    saved(sd3(0), home / "config")
    for seed, (name, prefix) in enumerate((("a", "model.diffusion_model."), ("b", ""))):
        extra = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3)} if prefix else {}
        write_transformer("sd3", sd3_transformer(seed).state_dict(), home / f"{name}.safetensors", prefix, **extra)
    return home


@pytest.mark.parametrize("output", ["merged.safetensors", "merged"])
def test_single_files_of_transformers_are_merged_to_a_file_or_a_folder(output, transformers, tmp_path):
    files = [str(transformers / f"{name}.safetensors") for name in "ab"]
    config = str(transformers / "config")
    weights = ["0,1,0.5,0.25,0.1"]
    merge_files(MergeSettings(files, str(tmp_path / output), method="mbw", weights=weights, config=config))
    merged = load_expert(tmp_path / output, config=config).model.state_dict()
    expected = merge_experts(load_experts([sd3_transformer(0), sd3_transformer(1)]), "mbw", weights=weights[0]).model.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    if output.endswith("s"):
        assert load_file(tmp_path / output).keys() == load_file(files[0]).keys()  # its prefix, and what it has besides


def test_qwen_image_is_merged_from_folders_by_its_own_stages(tmp_path):
    folders = [str(saved(qwen_image_pipeline(seed), tmp_path / f"q{seed}")) for seed in range(2)]
    merge_files(MergeSettings(folders, str(tmp_path / "merged"), method="slerp"))
    merged = type(qwen_image_pipeline(0)).from_pretrained(tmp_path / "merged", local_files_only=True)
    assert apart(merged, merge_pipelines([qwen_image_pipeline(0), qwen_image_pipeline(1)], "slerp"), "transformer.") == 0


# ---- steps


STEPS = """
[[step]]
name = "soft"
experts = ["photo=a+style.safetensors*0.8", "b.safetensors"]
options = {{weights = [2, 1]}}

[[step]]
name = "rest"
method = "mbw"
experts = ["c", "soft"]
options = {{weights = {{others = 0.25, M00 = [1, 3]}}}}

[[step]]
method = "add_difference"
experts = ["soft", "rest"]
base = "base"
{more}
"""


def write_toml(home, text: str):
    (home / "merge.toml").write_text(text)
    return "merge.toml"


def test_steps_are_computed_as_one_after_the_other_in_single_precision(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    recipe = write_toml(home, STEPS.format(more=""))
    facts = merge_files(MergeSettings(None, str(tmp_path / "merged"), recipe=recipe, config="a"))
    assert [step["name"] for step in facts["steps"]] == ["soft", "rest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    photo, b = load_experts(["photo=a+style.safetensors*0.8", "b.safetensors"], config="a")
    soft = merge_experts([photo, b], weights=[2, 1])
    rest = merge_experts([load_expert("c"), soft], "mbw", weights={"others": [0.75, 0.25], "M00": [1, 3]})
    expected = merge_experts([soft, rest], "add_difference", base=load_expert("base"))
    merged = load_expert(tmp_path / "merged")
    assert all(torch.equal(one, other) for one, other in zip(merged.model.parameters(), expected.model.parameters(), strict=True))
    assert torch.equal(merged.load_vae().decoder.conv_in.weight, sd(0).vae.decoder.conv_in.weight)


def test_a_step_of_a_type_is_rounded_to_it_and_the_result_keeps_the_first_files(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    two = '[[step]]\nname = "first"\nexperts = ["a", "b"]\n{}[[step]]\nexperts = ["first", "c"]\n'
    for name, more in (("exact", ""), ("rounded", 'dtype = "bfloat16"\n')):
        merge_files(MergeSettings(None, str(tmp_path / name), recipe=write_toml(home, two.format(more))))
    exact, rounded = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("exact", "rounded"))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    a, b, c = (sd(seed).unet.state_dict()["conv_in.weight"] for seed in range(3))
    first = rules.weighted([a, b])
    assert torch.equal(exact["conv_in.weight"], rules.weighted([first, c]))
    assert torch.equal(rounded["conv_in.weight"], rules.weighted([first.bfloat16().float(), c]).bfloat16())


def test_a_lora_joins_the_result_of_a_step(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    text = '[[step]]\nname = "one"\nexperts = ["a"]\n[[step]]\nexperts = ["one+style.safetensors*0.5"]\n'
    merge_files(MergeSettings(None, str(tmp_path / "merged"), recipe=write_toml(home, text)))
    merged, expected = load_expert(tmp_path / "merged").model, load_expert("a+style.safetensors*0.5").model
    assert all(torch.equal(one, other) for one, other in zip(merged.parameters(), expected.parameters(), strict=True))


def test_the_demonstrations_models_are_named_in_a_recipe(tmp_path, capsys):
    (tmp_path / "demo.toml").write_text('[[step]]\nexperts = ["demo:curves", "demo:angles"]\nbase = "demo:base"\nmethod = "ties"\n')
    assert main(["merge", "--recipe", str(tmp_path / "demo.toml"), "--output", str(tmp_path / "m"), "--dry-run"]) == 0
    assert "method   ties" in capsys.readouterr().out


# ---- again


def again(source, output, **changes) -> None:
    merge_files(MergeSettings(output=str(output), recipe=str(source), **changes))


@pytest.mark.parametrize("method", MERGES)
def test_a_merged_file_is_made_again_with_the_same_bytes(method, home):
    merge = MERGES[method]
    options = {"mbw": {"weights": ["GRAD_V"]}, "weighted": {"weights": ["3", "1", "2"]}, "dare": {"seed": 7}}.get(method, {})
    experts = ["a", "b.safetensors", "c"][: 2 if method == "mbw" else merge.experts]
    base = {"base": str(home / "base.safetensors")} if merge.needs("base") else {}
    merge_files(settings(home, home / f"{method}.safetensors", *experts, method=method, **base, **options))
    again(home / f"{method}.safetensors", home / f"{method}-again.safetensors")
    assert sha256(home / f"{method}.safetensors") == sha256(home / f"{method}-again.safetensors")


def test_a_merged_folder_and_several_steps_with_loras_are_made_again(home, monkeypatch):
    monkeypatch.chdir(home)
    recipe = write_toml(home, STEPS.format(more='dtype = "bfloat16"\nvae = "rest"'))
    merge_files(MergeSettings(None, "stepped", recipe=recipe, config="a"))
    again("stepped", "stepped-again")
    files = [path.relative_to(home / "stepped") for path in (home / "stepped").rglob("*") if path.is_file() and path.name[0] != "."]
    assert len(files) > 8
    assert all((home / "stepped" / file).read_bytes() == (home / "stepped-again" / file).read_bytes() for file in files)


def test_inputs_that_moved_are_found_where_the_user_says(home, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}-renamed.safetensors").symlink_to(home / f"{name}.safetensors")
    merge_files(settings(home, tmp_path / "merged.safetensors", "a.safetensors", "b.safetensors"))
    places = [f"{name}={tmp_path / name}-renamed.safetensors" for name in "ab"]
    again(tmp_path / "merged.safetensors", tmp_path / "again.safetensors", experts=places, config=str(home / "a"))
    assert sha256(tmp_path / "merged.safetensors") == sha256(tmp_path / "again.safetensors")


def test_embedded_models_need_no_place(tmp_path):
    assert main(["merge", "--experts", "demo:curves", "demo:angles", "--output", str(tmp_path / "m.safetensors")]) == 0
    assert main(["merge", "--recipe", str(tmp_path / "m.safetensors"), "--output", str(tmp_path / "n.safetensors")]) == 0
    assert sha256(tmp_path / "m.safetensors") == sha256(tmp_path / "n.safetensors")


def test_what_is_recorded_names_files_and_loras_by_their_hash_and_no_places(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    merge_files(MergeSettings(["photo=a+style.safetensors*0.8", "b"], str(tmp_path / "m.safetensors")))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        record = json.loads(file.metadata()["afa.merge"])
    assert record["experts"][0]["loras"] == [{"source": "style.safetensors", "sha256": sha256(home / "style.safetensors"), "strength": 0.8}]
    assert record["experts"][1]["source"] == "b"


# ---- one file and one line


def middle(tensors, *, base, pull: Annotated[float, rules.Option("how far from the base", least=0, most=1)] = 0.5):
    """A toy: half-way to the base. pull: how far. Source: none."""
    return base + pull * (tensors[0] - base)


TOY = Merge(middle, title="toy", help="half-way", row="half-way to the base", experts=1, candidates=lambda count, stages: [{"pull": 0.1}])


def test_a_further_merge_is_one_line_in_the_registry(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MERGES, "toy", TOY)
    arguments = ["merge", "--method", "toy", "--experts", str(home / "a"), "--base", str(home / "base"), "--output"]
    assert main([*arguments, str(tmp_path / "m"), "--method-option", "pull=0.25"]) == 0
    a, base = (sd(seed).unet.state_dict()["conv_in.weight"] for seed in (0, 3))
    merged = load_file(tmp_path / "m/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(merged, base + 0.25 * (a - base))
    again(tmp_path / "m", tmp_path / "n", experts=[f"a={home / 'a'}", f"base={home / 'base'}"])
    for wrong, sentence in (("pul=1", "did you mean 'pull'"), ("pull=2", "toy: pull 2 is too large"), ("pull", "has no value")):
        assert main([*arguments, str(tmp_path / "x"), "--method-option", wrong]) == 2
        assert sentence in capsys.readouterr().err


def second(tensors, *, stage, weights):
    """A toy: the second expert where it has more weight. weights: of every stage. Source: none."""
    return tensors[int(weights[stage][1] > 0.5)].clone()


def test_a_further_merge_by_stage_needs_only_its_entry(home, tmp_path, monkeypatch, capsys):
    """Plan, files, memory and rows of comparisons know by `by_stage` that its weights are one set a stage."""
    mbw = MERGES["mbw"]
    toy = Merge(second, title="toy", help="one or the other", row="a toy", candidates=mbw.candidates, fill=mbw.fill, by_stage=True)
    monkeypatch.setitem(MERGES, "toy", toy)
    experts = ["--method", "toy", "--experts", str(home / "a"), str(home / "b"), "--weights", "0,0,1,1,1,0,0,0,0"]
    assert main(["merge", *experts, "--output", str(tmp_path / "m"), "--dry-run"]) == 0
    assert "stage    IN02 … M00: 0 1" in capsys.readouterr().out
    assert main(["merge", *experts, "--output", str(tmp_path / "m")]) == 0
    merged, a, b = (load_expert(str(place)) for place in (tmp_path / "m", home / "a", home / "b"))
    again = merge_experts([a, b], "toy", weights="0,0,1,1,1,0,0,0,0").model.state_dict()
    for name, tensor in merged.model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert torch.equal(again["conv_in.weight"], a.model.conv_in.weight)
    assert torch.equal(again["mid_block.resnets.0.conv1.weight"], b.model.mid_block.resnets[0].conv1.weight)


def test_every_merge_is_a_row_of_comparisons():
    assert all(known_methods()[name] == merge.row for name, merge in MERGES.items())


def test_what_the_page_on_merging_says_to_type_works_after_installing(tmp_path, monkeypatch):
    """Every command on embedded models, and the recipe, in their order."""
    page = (Path(__file__).parent.parent / "docs/merging.md").read_text()
    monkeypatch.chdir(tmp_path)
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    Path("merge.toml").write_text(toml)
    lines = [line.strip().removeprefix("afa ") for line in page.splitlines() if line.startswith("    afa merge ")]
    works = [line for line in lines if "demo:" in line or ("--recipe" in line and "/models/" not in line)]
    assert len(works) >= 6
    for line in works:
        if Path(line.split("--output ")[1].split()[0]).exists():
            Path("merged.safetensors").unlink()
        assert main(line.split()) == 0, line
    assert sha256(Path("merged.safetensors")) == sha256(Path("again.safetensors"))


# ---- devices


def test_a_device_that_is_not_there_is_refused_and_the_cpu_is_the_default(home, tmp_path, capsys):
    arguments = ["merge", "--experts", str(home / "a"), str(home / "b"), "--output", str(tmp_path / "m")]
    assert main([*arguments, "--device", "nowhere"]) == 2
    assert "--device nowhere" in capsys.readouterr().err
    assert make_plan(MergeSettings([str(home / "a")], str(tmp_path / "m"))).last.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", MERGES)
def test_a_merge_on_a_gpu_is_that_on_the_cpu_but_for_rounding(method, home, tmp_path):
    merge = MERGES[method]
    options = {"weights": ["GRAD_V"]} if method == "mbw" else {}
    base = {"base": str(home / "base")} if merge.needs("base") else {}
    for device in ("cpu", "cuda"):
        merge_files(settings(home, tmp_path / f"{device}.safetensors", "a", "b", method=method, device=device, **base, **options))
    one, other = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    assert all(torch.allclose(one[name], tensor, atol=1e-6, rtol=1e-5) for name, tensor in other.items())
