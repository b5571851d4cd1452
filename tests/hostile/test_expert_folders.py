"""Folders of experts: the same weight files for every command, and no class but the libraries' own."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from merging_models import saved, sd
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL

import afa.experts.parts
from afa.errors import UserError
from afa.experts.description import describe_expert, shared_text_encoders
from afa.experts.folders import read_folder, weight_files
from afa.experts.load import load_expert
from afa.experts.locate import expert_files, locate
from afa.experts.spec import ExpertSpec
from afa.frame import Frame
from afa.merging.sources import Reader, open_source
from afa.schedulers import read_scheduler

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
KEY = "conv_in.bias"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return saved(sd(0, **ONE_LEVEL), tmp_path_factory.mktemp("original") / "curves")


@pytest.fixture
def folder(original, tmp_path):
    """A copy of an expert without its weights' bytes: files are linked, and replaced where a test writes."""
    return Path(shutil.copytree(original, tmp_path / "curves", copy_function=os.link))


def replace(path: Path, content) -> Path:
    path.unlink(missing_ok=True)
    if isinstance(content, dict) and any(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, path, metadata={"format": "pt"})
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def marked(folder: Path, part: str, value: float) -> dict[str, torch.Tensor]:
    """A part's weights, one of which says where they come from."""
    tensors = load_file(folder / part)
    key = KEY if part == UNET else "final_layer_norm.bias"
    return tensors | {key: torch.full_like(tensors[key], value)}


INDEX = "{stem}.safetensors.index{middle}.json"


def shards(folder: Path, part: str, tensors, variant: str | None = None, stem: str | None = None, index: str = INDEX) -> None:
    """Write weights in two shards and their index, as the libraries name them."""
    home, stem = (folder / part).parent, stem or Path(part).stem
    middle = f".{variant}" if variant else ""
    names, weight_map = list(tensors), {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}{middle}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, home / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    replace(home / index.format(stem=stem, middle=middle), {"metadata": {"total_size": 1}, "weight_map": weight_map})


def seen(folder: Path, part: str = UNET) -> list[float]:
    """The marked weight, as each way to read an expert finds it: loaded, merged, inspected, hashed."""
    key = KEY if part == UNET else "final_layer_norm.bias"
    name = f"{part.partition('/')[0]}.{key}"
    expert = load_expert(str(folder))
    loaded = (expert.model if part == UNET else expert.text_encoders[0]).state_dict()
    source = open_source(ExpertSpec("x", str(folder)))
    with Reader() as reader:
        merged = reader.read(source.tensors[name])
    entry = describe_expert(ExpertSpec("x", str(folder))).components[part.partition("/")[0]].tensors[key]
    hashed = [file for file in expert_files(locate(ExpertSpec("x", str(folder)))).values() if file == entry.file]
    of_loaded = next(tensor for other, tensor in loaded.items() if other.endswith(key))
    return [float(of_loaded[0]), float(merged[0]), float(load_file(entry.file)[key][0]), float(load_file(hashed[0])[key][0])]


@pytest.mark.parametrize(("part", "chosen"), [(UNET, 2.0), (TEXT, 1.0)], ids=["diffusers", "transformers"])
def test_a_whole_file_beside_shards_is_the_same_answer_for_all(folder, part, chosen):
    """The library's own rule: diffusers takes the shards, transformers the whole file."""
    sharded = marked(folder, part, 2.0)
    replace(folder / part, marked(folder, part, 1.0))
    shards(folder, part, sharded)
    assert seen(folder, part) == [chosen] * 4


def test_plain_weights_are_taken_before_those_of_a_variant(folder):
    replace(folder / UNET.replace(".safetensors", ".fp16.safetensors"), marked(folder, UNET, 2.0))
    replace(folder / UNET, marked(folder, UNET, 1.0))
    assert seen(folder) == [1.0] * 4


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shards"])
def test_a_folder_that_has_only_a_variant_is_read(folder, variant, sharded):
    for part in (UNET, TEXT):
        half = {name: tensor.half() for name, tensor in marked(folder, part, 3.0).items()}
        (folder / part).unlink()
        if sharded:
            shards(folder, part, half, variant)
        else:
            replace(folder / part.replace(".safetensors", f".{variant}.safetensors"), half)
    assert seen(folder) == seen(folder, TEXT) == [3.0] * 4


@pytest.mark.parametrize("index", [INDEX, "{stem}{middle}.safetensors.index.json", "{stem}.safetensors{middle}.index.json"])
def test_the_index_of_a_variant_is_found_under_every_name_that_it_has_had(folder, index):
    for part in (UNET, TEXT):
        half = {name: tensor.half() for name, tensor in marked(folder, part, 3.0).items()}
        plain = marked(folder, part, 2.0)
        shards(folder, part, half, "fp16", index=index)
        assert seen(folder, part)[0] != 3.0  # the plain file
        (folder / part).unlink()
        assert seen(folder, part) == [3.0] * 4
        shards(folder, part, plain)
        assert seen(folder, part) == [2.0] * 4  # plain shards


def test_a_vae_that_has_only_a_variant_is_read(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert load_expert(str(folder)).load_vae() is not None


def test_variants_of_which_none_is_the_natural_one_are_refused_by_name(folder):
    for variant in ("ema", "non_ema"):
        replace(folder / UNET.replace(".safetensors", f".{variant}.safetensors"), marked(folder, UNET, 2.0))
    (folder / UNET).unlink()
    with pytest.raises(UserError, match="variants ema, non_ema"):
        weight_files(folder / "unet")


def test_the_file_that_a_manifest_does_not_know_is_noticed(folder):
    from afa.checkpoint.manifest import ExpertEntry, check_hashes
    from afa.experts.locate import hash_expert

    located = locate(ExpertSpec("x", str(folder)))
    entry = ExpertEntry("x", str(folder), files=hash_expert(located))
    check_hashes(entry, located)
    shards(folder, UNET, marked(folder, UNET, 2.0))
    with pytest.raises(UserError, match="now loaded from unet/diffusion_pytorch_model-00001"):
        check_hashes(entry, located)


def test_a_manifest_that_names_files_which_are_not_loaded_is_still_good(folder):
    from afa.checkpoint.manifest import ExpertEntry, check_hashes
    from afa.experts.locate import hash_expert
    from afa.files import sha256

    other = replace(folder / UNET.replace(".safetensors", ".fp16.safetensors"), marked(folder, UNET, 2.0))
    located = locate(ExpertSpec("x", str(folder)))
    files = hash_expert(located)
    assert other.relative_to(folder).as_posix() not in files
    check_hashes(ExpertEntry("x", str(folder), files=files | {other.relative_to(folder).as_posix(): sha256(other)}), located)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"metadata": {}, "weight_map": {KEY: "../../other.safetensors"}}, "expected a .safetensors file beside it"),
        ({"metadata": {}, "weight_map": {KEY: "/etc/passwd"}}, "expected a .safetensors file beside it"),
        ({"metadata": {}, "weight_map": {KEY: "other.bin"}}, "expected a .safetensors file beside it"),
        ({"metadata": {}, "weight_map": {KEY: 3}}, "no weight_map"),
        ({"metadata": {}, "weight_map": []}, "no weight_map"),
        ({"metadata": {}, "weight_map": {}}, "no weight_map"),
        ({"metadata": None, "weight_map": {KEY: "diffusion_pytorch_model.safetensors"}}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "holds a list"),
        ("{", "cannot be read"),
        ("[" * 9000, "cannot be read"),
    ],
)
def test_a_strange_index_of_shards_is_refused_by_name(folder, index, match):
    replace(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", index)
    for read in (read_folder, weight_files):
        with pytest.raises(UserError, match=match) as raised:
            read(folder / "unet")
        assert "index.json" in str(raised.value)


def test_only_pickles_are_refused_whatever_part_they_are_of(original, folder):
    for part in ("unet", "text_encoder", "vae"):
        file = next((folder / part).glob("*.safetensors"))
        pickle = file.with_suffix(".bin")
        pickle.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        file.unlink()
        with pytest.raises(UserError, match=rf"{part} are pickled \({pickle.name}\)"):
            _ = load_expert(str(folder)).load_vae()
        os.link(original / part / file.name, file)


COMMANDS = {
    "load": lambda folder: load_expert(str(folder)),
    "inspect": lambda folder: describe_expert(ExpertSpec("x", str(folder))),
    "merge": lambda folder: open_source(ExpertSpec("x", str(folder))),
    "hash": lambda folder: expert_files(locate(ExpertSpec("x", str(folder)))),
}
STRANGE = {
    "a function": ["diffusers", "load_image"],
    "a module": ["diffusers", "utils"],
    "a base class": ["diffusers", "ModelMixin"],
    "a base class of transformers": ["transformers", "PreTrainedModel"],
    "an unfinished class": ["transformers", "CLIPPreTrainedModel"],
    "an automatic class": ["transformers", "AutoModel"],
    "another kind of class": ["diffusers", "DDIMPipeline"],
    "a scheduler or a model": ["diffusers", "EMAModel"],
    "an unknown class": ["diffusers", "UNet9DModel"],
    "an attribute": ["diffusers", "__class__"],
    "a stranger's module": ["my_pipeline", "MyModel"],
    "a module of python": ["os", "system"],
    "a path": ["../evil", "Model"],
    "a dotted name": ["diffusers", "models.UNet2DConditionModel"],
    "one name": ["diffusers"],
    "three names": ["diffusers", "UNet2DConditionModel", "x"],
    "numbers": [1, 2],
    "half nothing": ["diffusers", None],
    "half a name": [None, "UNet2DConditionModel"],
    "nested lists": [["diffusers"], ["UNet2DConditionModel"]],
    "text": "UNet2DConditionModel",
    "a number": 3,
    "an object": {"class": "UNet2DConditionModel"},
    "nothing in it": [],
}


@pytest.fixture
def index(folder):
    """Change entries of model_index.json."""
    content = json.loads((folder / "model_index.json").read_text())
    return lambda **entries: replace(folder / "model_index.json", content | entries)


@pytest.mark.parametrize("entry", STRANGE.values(), ids=STRANGE)
def test_a_strange_class_is_refused_before_a_library_is_asked(folder, index, entry, monkeypatch):
    monkeypatch.setattr(afa.experts.parts, "from_pretrained", lambda *_: pytest.fail("a library was asked"))
    for part in ("unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        index(**{part: entry})
        for command in COMMANDS.values():
            with pytest.raises(UserError, match=rf"model_index.json.*{part}") as raised:
                command(folder)
            assert len(str(raised.value)) < 500


@pytest.mark.parametrize("part", ["safety_checker", "feature_extractor", "image_encoder", "controlnet", "anything"])
@pytest.mark.parametrize("entry", [["my_pipeline", "MyModel"], ["os", "system"], ["diffusers", "a.b"], ["diffusers"], [None, "a"]])
def test_a_strange_class_of_a_part_that_is_not_loaded_is_refused_too(folder, index, part, entry):
    index(**{part: entry})
    with pytest.raises(UserError, match=rf"model_index.json.*{part}"):
        load_expert(str(folder))


@pytest.mark.parametrize("name", [None, 3, ["evil", "Pipe"], {}, "", "DiffusionPipeline", "load_image", "AutoPipelineForText2Image", "MyPipeline", "x" * 10**5])
def test_a_strange_class_of_the_pipeline_is_refused_by_every_command(folder, index, name):
    index(_class_name=name)
    for command in COMMANDS.values():
        with pytest.raises(UserError, match="model_index.json: the pipeline's _class_name") as raised:
            command(folder)
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "[" * 9000, '{"a": NaN}', '{"a": "\\ud800"}'])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_settings_that_are_no_object_are_refused_by_the_name_of_their_file(folder, file, text):
    replace(folder / file, text)
    with pytest.raises(UserError, match=rf"{Path(file).name} cannot be read"):
        load_expert(str(folder))


CONFIGS = {
    "code of its own": {"auto_map": {"AutoModel": "evil--evil.Model"}},
    "quantisation": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "another weight file": {"transformers_weights": "other.safetensors"},
    "attention from the hub": {"_attn_implementation": "org/kernel"},
    "attention, a list": {"attn_implementation": ["a"]},
    "a class that is a list": {"_class_name": ["evil", "Model"]},
    "a class that is a number": {"_class_name": 3},
    "architectures that are text": {"architectures": "CLIPTextModel"},
    "architectures of numbers": {"architectures": [1]},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_settings_that_ask_for_other_code_or_files_are_refused_by_name(folder, part, change):
    file = folder / part / "config.json"
    replace(file, json.loads(file.read_text()) | change)
    with pytest.raises(UserError, match=rf"{part}/config.json: {next(iter(change))}"):
        _ = load_expert(str(folder)).load_vae()


QUANTISERS = {
    "bitsandbytes (nf4)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao (int8wo)": {"quant_method": "torchao", "quant_type": "int8wo"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "quanto (int8)": {"quant_method": "quanto", "weights_dtype": "int8"},
    "gguf": {"quant_method": "gguf", "compute_dtype": "bfloat16"},
    "sdnq (uint4)": {"quant_method": "sdnq", "weights_dtype": "uint4"},
    "nunchaku_lite": {"quant_method": "nunchaku_lite"},
    "a method without a name": ["evil"],
}


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_quantised_folder_is_refused_by_its_quantisers_name_with_what_to_take_instead(folder, part, name):
    file = folder / part / "config.json"
    replace(file, json.loads(file.read_text()) | {"quantization_config": QUANTISERS[name]})
    with pytest.raises(UserError, match=re.escape(f"quantised by {name}, which is not read; take the folder in bf16")):
        load_expert(str(folder))


def test_tokenizers_and_schedulers_with_code_of_their_own_are_refused(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    for part, file in (("tokenizer", "tokenizer_config.json"), ("scheduler", "scheduler_config.json")):
        path = folder / part / file
        before = json.loads(path.read_text()) if path.exists() else {}
        replace(path, before | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
        with pytest.raises(UserError, match=f"{file}: auto_map"):
            load_expert(str(folder))
        replace(path, before)


def test_a_folder_of_a_tokenizer_or_a_scheduler_never_runs_code(original, folder, tmp_path):
    """--tokenizer and --scheduler take folders that no pipeline describes."""
    expert = load_expert(str(original))
    other = Path(shutil.copytree(folder / "tokenizer", tmp_path / "tok"))
    replace(other / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"})
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    with pytest.raises(UserError, match="auto_map"):
        _ = Frame([expert], tokenizer=str(other)).tokenizers
    for name in ("load_image", "SchedulerMixin", "UNet2DConditionModel", ["a"], None):
        scheduler = folder / "scheduler" / "scheduler_config.json"
        replace(scheduler, json.loads((original / "scheduler" / "scheduler_config.json").read_text()) | {"_class_name": name})
        with pytest.raises(UserError, match="scheduler"):
            read_scheduler(folder)
    assert not (tmp_path / "ran").exists()


WRONG = [None, -1, 10**30, 1.5, True, "text", [], [1, [2]], {}, {"a": 1}]


@pytest.mark.parametrize("value", [10**6, 10**30, -(10**6)])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("text_encoder/config.json", "num_hidden_layers"),
        ("unet/config.json", "layers_per_block"),
        ("unet/config.json", "transformer_layers_per_block"),
        ("vae/config.json", "layers_per_block"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
    ],
)
def test_a_number_of_layers_or_timesteps_that_no_model_has_is_refused_at_once(folder, file, key, value):
    value = value * 10 if key == "num_train_timesteps" else value
    config = json.loads((folder / file).read_text())
    replace(folder / file, config | {key: [1, value] if key.startswith("transformer") else value})
    with pytest.raises(UserError, match=rf"{file}: {key} is .*at most 1,000"):
        load_expert(str(folder)).load_vae()


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_settings_of_a_wrong_type_end_in_a_sentence_or_load(folder, value):
    """Whatever the libraries make of them: never in a traceback."""
    for part, keys in (
        ("unet", ("block_out_channels", "cross_attention_dim")),
        ("text_encoder", ("hidden_size", "hidden_act")),
        ("scheduler", ("beta_schedule", "trained_betas")),
    ):
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        before = file.read_text()
        for key in keys:
            replace(file, json.loads(before) | {key: value})
            for command in (COMMANDS["inspect"], COMMANDS["load"]):
                with contextlib.suppress(UserError):
                    command(folder)
        replace(file, before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("is_distilled", "no"), ("is_distilled", 1), ("text_encoder_select_layers", 3), ("patch_size", "2"), ("sample_sigmas", 5), ("sample_sigmas", [1.0])],
)
def test_a_setting_of_a_pipeline_of_another_type_is_refused_by_name(folder, setting, value):
    """Else a text such as "no" would count as true, and the model be drawn without guidance."""
    index = json.loads((folder / "model_index.json").read_text())
    replace(folder / "model_index.json", index | {setting: value})
    for read in (lambda: describe_expert(ExpertSpec.parse(str(folder))), lambda: load_expert(str(folder))):
        with pytest.raises(UserError, match=setting):
            read()


def test_a_denoiser_of_another_class_is_refused_by_name(folder, index):
    index(unet=["diffusers", "UNet2DModel"])
    for command in (COMMANDS["load"], COMMANDS["inspect"]):
        with pytest.raises(UserError, match="a UNet2DModel cannot be an expert"):
            command(folder)
    index(unet=["diffusers", "UNet2DConditionModel"])
    config = folder / "unet" / "config.json"
    replace(config, json.loads(config.read_text()) | {"_class_name": "UNet2DModel"})
    for command in (COMMANDS["load"], COMMANDS["inspect"]):
        with pytest.raises(UserError, match="config.json is of a UNet2DModel, model_index.json says UNet2DConditionModel"):
            command(folder)


def test_a_part_that_is_an_adapter_is_refused(folder):
    """transformers would load another model's weights in its place."""
    replace(folder / "text_encoder" / "adapter_config.json", {"base_model_name_or_path": "elsewhere"})
    for command in (COMMANDS["load"], COMMANDS["inspect"]):
        with pytest.raises(UserError, match="adapter_config.json"):
            command(folder)


def test_position_ids_never_make_two_text_encoders_unlike(folder, tmp_path):
    places = []
    ids = torch.arange(24)[None]
    for name, kept in (("none", None), ("whole", ids), ("half", ids.half()), ("scaled", ids * 0.9)):
        place = Path(shutil.copytree(folder, tmp_path / name, copy_function=os.link))
        tensors = load_file(place / TEXT)
        replace(place / TEXT, tensors | ({} if kept is None else {"embeddings.position_ids": kept}))
        places.append(place)
    descriptions = [describe_expert(ExpertSpec(place.name, str(place))) for place in places]
    assert shared_text_encoders(descriptions) == [[None], ["none"], ["none"], ["none"]]
    right = load_expert(str(places[0])).text_encoders[0](torch.arange(24)[None]).last_hidden_state
    for place in places[1:]:
        assert torch.equal(load_expert(str(place)).text_encoders[0](torch.arange(24)[None]).last_hidden_state, right)
        source = open_source(ExpertSpec("x", str(place)))
        with Reader() as reader:
            assert torch.equal(reader.read(source.tensors["text_encoder.embeddings.position_ids"]), ids)
        assert "text_encoder.embeddings.position_ids" not in source.floats()


def test_a_strange_class_in_a_repository_of_the_hub_is_refused_before_the_rest_is_fetched(folder, index, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--photo"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: pytest.fail("a library was asked"))
    for entries in ({"_class_name": ["evil", "Pipe"]}, {"_class_name": "Nothing"}, {"unet": ["evil", "Net"]}):
        index(**({"_class_name": "StableDiffusionPipeline"} | entries))
        shutil.rmtree(repo, ignore_errors=True)
        shutil.copytree(folder, repo / "snapshots" / commit, copy_function=os.link)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        with pytest.raises(UserError, match="model_index.json"):
            load_expert("org/photo@main")
