"""Single files of transformers: the table by which they are known, the publishers' names and diffusers', with whatever stands before them."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from gguf_writing import write_gguf
from original_transformers import originals
from published_transformers import NAMES, published
from safetensors.torch import load_file, save_file
from scaled_weights import SPELLINGS, stored
from tiny_chroma import CHROMA_SMALL, chroma_pipeline, chroma_transformer
from tiny_flux2 import (
    FLUX2_SMALL,
    flux2_pipeline,
    flux2_transformer,
    klein_pipeline,
    klein_transformer,
    mistral_encoder,
    qwen3_encoder,
)
from tiny_krea2 import KREA2_SMALL, krea2_pipeline, krea2_transformer
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline, lumina2_transformer
from tiny_qwen_image_21 import QWEN_IMAGE_21_SMALL, qwen_image_21_pipeline, qwen_image_21_transformer
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    flux_pipeline,
    flux_transformer,
    qwen_image_pipeline,
    qwen_image_transformer,
    sd3_pipeline,
    sd3_transformer,
)
from tiny_z_image import Z_IMAGE_SMALL, z_image_pipeline, z_image_transformer

from afa import Ensemble, UserError
from afa.experts.description import describe, describe_config, describe_expert
from afa.experts.gguf_files import ONE_ROW
from afa.experts.layouts import layout_of
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.experts.lora import fuse, load_lora
from afa.experts.lora_files import kohya_tensors
from afa.experts.single_file import detect_config
from afa.experts.spec import ExpertSpec
from afa.experts.transformer_names import PREFIXES, TRANSFORMERS, transformer_in
from afa.experts.transformer_places import to_original
from afa.experts.vae import describe_vae
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings
from afa.merging.single_file import original_places


def shallow(pipeline, encoder, seed, **transformer):
    """With two layers of text encoder in place of the thirty that FLUX.2 reads: nothing is drawn here."""
    made = pipeline(seed, **transformer)
    made.register_modules(text_encoder=encoder(0, num_hidden_layers=2))
    return made


SMALL = {  # of SD3 a block with dual attention, a plain one, and the last
    "sd3": (sd3_pipeline, sd3_transformer, {"num_layers": 3, "dual_attention_layers": (0,)}),
    "flux": (flux_pipeline, flux_transformer, FLUX_SMALL),
    "qwen-image": (qwen_image_pipeline, qwen_image_transformer, QWEN_IMAGE_SMALL),
    "flux2": (functools.partial(shallow, flux2_pipeline, mistral_encoder), flux2_transformer, FLUX2_SMALL),
    "klein": (functools.partial(shallow, klein_pipeline, qwen3_encoder), klein_transformer, FLUX2_SMALL),
    "chroma": (chroma_pipeline, chroma_transformer, CHROMA_SMALL | {"num_single_layers": 2}),
    "z-image": (z_image_pipeline, z_image_transformer, Z_IMAGE_SMALL),
    "krea2": (krea2_pipeline, krea2_transformer, KREA2_SMALL),
    "qwen-image-2.1": (qwen_image_21_pipeline, qwen_image_21_transformer, QWEN_IMAGE_21_SMALL),
    "lumina2": (lumina2_pipeline, lumina2_transformer, LUMINA2_SMALL),
}
TINY = {name: (functools.partial(pipeline, **small), functools.partial(model, **small)) for name, (pipeline, model, small) in SMALL.items()}
OF = {"klein": "flux2", "flux2-klein": "flux2", "flux2-klein-9b": "flux2"}  # whose names a model has
KOHYA = [name for name in TINY if name not in ("sd3", "flux")]  # these are tried in test_distill.py
PUBLISHED = [name for name in TINY if name != "qwen-image"]  # of which the publisher's names are not diffusers'
# What is tried -> of which families; docs/family_tables.py makes the table of the docs of it.
TRIED = {
    "publisher's or ComfyUI's names": PUBLISHED,
    "diffusers' names": list(TINY),
    "merge of such files": list(TINY),
    "merge of folders to one file": list(TINY),
    "fp8 with scales": [*PUBLISHED, "qwen-image"],
    "GGUF": PUBLISHED,
    "LoRA in kohya's names": [*KOHYA, "sd3", "flux"],
}
CONFIGS = ("sd3", "sd35", "sd35-large", "flux", "flux-schnell", "qwen-image", "flux2", "flux2-klein", "flux2-klein-9b", "chroma", "z-image", "krea2")
CONFIGS += ("qwen-image-2.1", "lumina2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name, (pipeline, _) in TINY.items():
        pipeline(0).save_pretrained(root / name)
    return root


@functools.cache
def tuned(family):
    """A fine-tune that no test changes."""
    return TINY[family][1](1)


def same_weights(one, other):
    wanted = other.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in one.state_dict().items())


def loads_as(model, file, config):
    """In both dtypes; some models keep a part in float32."""
    kept, wanted = set(getattr(model, "_keep_in_fp32_modules", None) or ()), model.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        for name, tensor in load_expert(str(file), dtype, config).model.state_dict().items():
            own = torch.float32 if kept & set(name.split(".")) else dtype
            if tensor.dtype != own or not torch.equal(tensor, wanted[name].to(own)):
                return False
    return True


def save(tensors, path, prefix=""):
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write(model, path, prefix=""):
    return save(model.state_dict(), path, prefix)


@functools.cache
def tuned_state(family):
    """Its tensors under the publisher's names."""
    return published_state(family, tuned(family))


def published_state(family, model):
    kind, state = OF.get(family, family), dict(model.state_dict())
    return published(kind, state) if kind in NAMES else dict(originals(kind, state))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", TRIED["diffusers' names"])
def test_under_diffusers_names_it_is_the_model_it_was_made_of(family, prefix, folders, tmp_path):
    model = tuned(family)
    assert loads_as(model, write(model, tmp_path / "diffusion_pytorch_model.safetensors", prefix), str(folders / family))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", PUBLISHED)
def test_under_its_publishers_names_it_is_the_model_it_was_made_of(family, prefix, folders, tmp_path):
    assert loads_as(tuned(family), save(tuned_state(family), tmp_path / "one.safetensors", prefix), str(folders / family))


# Each prefix with a third of the families: a merge takes the names of all tensors from its first file.
MERGED = [(family, PREFIXES[place % len(PREFIXES)]) for place, family in enumerate(TRIED["merge of such files"])]


@pytest.mark.parametrize(("family", "prefix"), MERGED)
def test_a_merge_of_equal_files_is_that_file_whatever_names_the_second_has(family, prefix, folders, tmp_path):
    own = write(tuned(family), tmp_path / "own.safetensors", prefix)
    pairs = [(own, own)]
    if family in PUBLISHED:
        other = save(tuned_state(family), tmp_path / "other.safetensors", prefix)
        pairs += [(other, other), (other, write(tuned(family), tmp_path / "plain.safetensors"))]
    for count, (first, second) in enumerate(pairs):
        merge_files(MergeSettings([f"x={first}", f"y={second}"], str(tmp_path / f"{count}.safetensors"), config=str(folders / family)))
        before, merged = load_file(first), load_file(tmp_path / f"{count}.safetensors")
        assert merged.keys() == before.keys() and all(torch.equal(tensor, merged[name]) for name, tensor in before.items())


@pytest.mark.parametrize("config", [config for config in CONFIGS if config not in ("qwen-image", "sd35-large", "flux-schnell")])
def test_diffusers_converters_read_every_published_name_as_this_house_does(config):
    """With the rows of the real model, each of one number of its own: some converters know one width only."""
    model = described(config).expert.model
    state, count = {}, 0
    for name, tensor in model.state_dict().items():
        state[name] = torch.arange(count, count + tensor.shape[0], dtype=torch.float64).reshape(-1, *[1] * (tensor.ndim - 1))
        count += tensor.shape[0]
    kind = OF.get(config, config)
    tensors = published(kind, state) if kind in NAMES else dict(originals("flux" if "flux" in config else "sd3", state))
    layout = layout_of(tensors, "file.safetensors")
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    theirs = tensors if layout.diffusers else convert(checkpoint=dict(tensors), config=model.config)
    ours = layout.to_diffusers(model, tensors)
    assert ours.keys() == theirs.keys() == state.keys()
    assert all(torch.equal(tensor, ours[name]) and torch.equal(tensor, theirs[name]) for name, tensor in state.items())


@pytest.mark.parametrize("family", TRIED["merge of folders to one file"])
def test_folders_become_one_file_of_the_publishers_names_which_is_the_merged_folder(family, folders, tmp_path):
    """Whole pipelines, and their denoisers alone."""
    TINY[family][0](1).save_pretrained(tmp_path / "other")
    both = str(folders / family), str(tmp_path / "other")
    for inside in ("", "transformer"):
        experts = [f"{name}={Path(place) / inside}" for name, place in zip("xy", both, strict=True)]
        for output in (f"merged{inside}", f"merged{inside}.safetensors"):
            facts = merge_files(MergeSettings(experts, str(tmp_path / output), weights=["2", "1"]))
            assert facts["vae"] == (None if inside or "." in output else "x")
        whole, file = load_expert(str(tmp_path / f"merged{inside}")).model, tmp_path / f"merged{inside}.safetensors"
        wanted = published_state(family, whole)
        found = load_file(file)
        assert found.keys() == wanted.keys() and all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
        assert loads_as(whole, file, both[0])


def test_the_recipe_of_such_a_file_makes_it_again_and_a_recipe_of_several_steps_makes_one(folders, tmp_path):
    TINY["lumina2"][0](1).save_pretrained(tmp_path / "other")
    experts = [f"x={folders / 'lumina2'}", f"y={tmp_path / 'other'}"]
    merge_files(MergeSettings(experts, str(tmp_path / "one.safetensors"), method="slerp"))
    merge_files(MergeSettings(experts, str(tmp_path / "two.safetensors"), recipe=str(tmp_path / "one.safetensors")))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    places = ", ".join(json.dumps(place) for place in experts)
    steps = [f'[[step]]\nname = "soft"\nmethod = "slerp"\nexperts = [{places}]', '[[step]]\nexperts = ["soft"]\ndtype = "float32"']
    (tmp_path / "steps.toml").write_text("\n".join(steps))
    merge_files(MergeSettings(output=str(tmp_path / "three.safetensors"), recipe=str(tmp_path / "steps.toml")))
    one, three = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "three"))
    assert one.keys() == three.keys() and all(torch.equal(tensor, three[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", PUBLISHED)
def test_gguf_files_are_the_model_they_were_made_of_with_their_tensors_of_one_row(family, folders, tmp_path):
    """ggml does not count sizes of 1 at the end of its own order."""
    model = tuned(family)
    for name, state in (("published", tuned_state(family)), ("own", dict(model.state_dict()))):
        squeezed = {name: tensor.squeeze(0) if name.endswith(ONE_ROW) else tensor for name, tensor in state.items()}
        assert any(tensor.ndim < state[name].ndim for name, tensor in squeezed.items()) == (family in ("z-image", "krea2"))
        file = write_gguf(tmp_path / f"{name}.gguf", squeezed)
        assert same_weights(load_expert(str(file), config=str(folders / family)).model, model)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", PUBLISHED)
def test_scaled_weights_under_publishers_names_are_multiplied_out(family, spelling, folders, tmp_path):
    tensors, metadata, wanted = stored(tuned_state(family), spelling=spelling, prefix="")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "fp8_scaled.safetensors", metadata)
    model = load_expert(str(tmp_path / "fp8_scaled.safetensors"), config=str(folders / family)).model
    found = published_state(family, model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("family", KOHYA)
def test_loras_in_kohyas_names_change_the_layers_that_their_publisher_calls_so(family):
    model = TINY[family][1](1)
    before, tensors, wanted = published_state(family, model), {}, {}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    own = published(OF.get(family, family), {f"{name}.weight": model.get_submodule(name).weight.detach() for name in linear})
    for name, weight in own.items():
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        wanted[name] = before[name] + up @ down / 2
    load_lora({"transformer": model}, tensors, "one", "the model")
    fuse(model)
    after = published_state(family, model)
    assert wanted and all(torch.allclose(after[name], tensor, atol=1e-5) for name, tensor in wanted.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in wanted)


@pytest.mark.parametrize("family", KOHYA)
def test_loras_written_in_kohyas_names_are_what_they_were_made_of(family):
    model = TINY[family][1](1)
    layers = {name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    factors = {name: (torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)) for name, weight in layers.items()}
    written = kohya_tensors(model, factors)
    own = published(OF.get(family, family), {f"{name}.weight": weight for name, weight in layers.items()})
    assert {name.partition(".")[0] for name in written} == {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}" for name in own}
    load_lora({"transformer": model}, written, "one", "the model")
    fuse(model)
    for name, (down, up) in factors.items():
        assert torch.allclose(model.get_submodule(name).weight, layers[name] + up @ down, atol=1e-4)


@pytest.mark.parametrize("other", range(len(TRANSFORMERS)))
@pytest.mark.parametrize("family", PUBLISHED)
def test_marks_of_another_family_change_nothing_or_are_refused(family, other, folders, tmp_path):
    model = tuned(family)
    marks = {mark: torch.zeros(2, 2) for mark in TRANSFORMERS[other].marks}
    file = save(marks | tuned_state(family), tmp_path / "both.safetensors")
    with contextlib.suppress(UserError):
        assert same_weights(load_expert(str(file), config=str(folders / family)).model, model)


@pytest.mark.parametrize("family", TINY)
def test_a_file_with_a_layer_more_than_its_config_makes_is_refused(family, folders, tmp_path):
    """Else a deeper model would be read without its last layers, and draw something else."""
    model = tuned(family)
    for state in (dict(model.state_dict()), *([tuned_state(family)] if family in PUBLISHED else [])):
        blocks = {}  # list of blocks -> its last block
        for name in state:
            if found := re.match(r"(\w+)\.(\d+)\.", name):
                blocks[found[1]] = max(int(found[2]), blocks.get(found[1], 0))
        for block, last in blocks.items():
            before, after = f"{block}.{last}.", f"{block}.{last + 1}."
            more = {name.replace(before, after): tensor.clone() for name, tensor in state.items() if name.startswith(before)}
            file = save(state | more, tmp_path / "deeper.safetensors")
            with pytest.raises(UserError, match=rf"{after}.*layer"):
                load_expert(str(file), torch.float32, str(folders / family))


def one_of_each_kind(state):
    return {name.partition(".")[0]: name for name in state}.values()


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("family", KOHYA)
def test_a_file_that_lacks_any_tensor_is_refused(family, folders, tmp_path):
    for state in (tuned(family).state_dict(), tuned_state(family)):
        for name in one_of_each_kind(state):
            file = header(without(state, name), tmp_path / "lacking.safetensors")
            with pytest.raises(UserError, match=r"lacking\.safetensors"):
                describe_expert(ExpertSpec.parse(str(file)), str(folders / family)).expert  # noqa: B018


@pytest.mark.parametrize("family", KOHYA)
def test_a_file_of_real_size_that_lacks_any_tensor_is_taken_for_no_other_and_is_refused(family, tmp_path):
    config = {"klein": "flux2-klein"}.get(family, family)
    for state in (real(config, True), real(config, False) if family != "qwen-image" else {}):
        for name in one_of_each_kind(state):
            lacking = without(state, name)
            with contextlib.suppress(UserError):
                if found := transformer_in(lacking):
                    assert found[0].config({key: tensor.shape for key, tensor in lacking.items()}, tmp_path) == config
        if state:
            with pytest.raises(UserError, match=r"lacking\.safetensors"):
                describe_expert(ExpertSpec.parse(str(header(lacking, tmp_path / "lacking.safetensors")))).expert  # noqa: B018


def test_an_all_in_one_file_of_lumina_2_gives_its_transformer_and_its_vae(folders, tmp_path):
    """As ComfyUI has it, with a text encoder, which is not read."""
    pipeline = TINY["lumina2"][0](3)
    shapes = {name: tensor.shape for name, tensor in pipeline.vae.state_dict().items()}
    places = original_places("vae", shapes)
    own = pipeline.vae.state_dict()
    vae = {place.key.replace("first_stage_model.", "vae."): to_original([own[name]], place.form) for name, place in places.items()}
    denoiser = {f"{PREFIXES[0]}{name}": tensor for name, tensor in published_state("lumina2", pipeline.transformer).items()}
    text = {"text_encoders.gemma2_2b.transformer.model.norm.weight": torch.ones(4), "text_encoders.gemma2_2b.spiece_model": torch.ones(4, dtype=torch.uint8)}
    file, folder = save(denoiser | vae | text, tmp_path / "lumina_2.safetensors"), str(folders / "lumina2")
    ensemble = Ensemble.from_experts([folder, str(file)], config=folder, vae=str(file), aggregator="mean")
    assert same_weights(ensemble.experts[1].model, pipeline.transformer) and same_weights(ensemble.frame.vae, pipeline.vae)


def test_one_joins_a_pipeline_that_lends_it_the_rest(folders, tmp_path):
    file = write(tuned("qwen-image"), tmp_path / "tuned.safetensors", PREFIXES[0])
    folder = str(folders / "qwen-image")
    ensemble = Ensemble.from_experts([folder, str(file)], config=folder, aggregator="mean")
    ensemble.save(tmp_path / "saved")
    assert same_weights(Ensemble.load(tmp_path / "saved").experts[1].model, tuned("qwen-image"))


def test_scaled_weights_under_diffusers_names_are_multiplied_out(folders, tmp_path):
    """As the files of Qwen-Image for ComfyUI."""
    tensors, metadata, wanted = stored(dict(tuned("qwen-image").state_dict()), spelling="old", prefix="")
    save_file(tensors, tmp_path / "fp8_scaled.safetensors", metadata)
    model = load_expert(str(tmp_path / "fp8_scaled.safetensors"), config=str(folders / "qwen-image")).model
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@functools.cache
def described(config):
    """A published model without content."""
    return describe_config("real", config)


@functools.cache
def real(config, diffusers):
    """Its tensors under either names."""
    state = dict(described(config).expert.model.state_dict())
    if diffusers or OF.get(config, config) in NAMES:
        return state if diffusers else published(OF.get(config, config), state)
    return dict(originals("flux" if "flux" in config else "sd3", state))


def header(tensors, path):
    """A file with names and shapes of tensors in bfloat16, and no content on the disk."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * math.prod(tensor.shape)
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


CASES = [(config, diffusers) for config in CONFIGS for diffusers in (False, True) if diffusers or config != "qwen-image"]


@pytest.mark.parametrize(("config", "diffusers"), CASES)
def test_real_files_are_recognised_by_one_entry_and_complete(config, diffusers, tmp_path):
    tensors = real(config, diffusers)
    file = header(tensors, tmp_path / "real.safetensors")
    found = describe_expert(ExpertSpec.parse(str(file)))
    model = found.expert.model
    assert (found.config, detect_config(file)) == (config, config) and model.dtype == torch.float32
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in model.state_dict().values())
    fitting = [entry for entry in TRANSFORMERS if all(mark in tensors for mark in entry.marks)]
    assert [(entry.diffusers, config in entry.configs) for entry in fitting] == [(layout_of(tensors, file).diffusers, True)]
    assert transformer_in(tensors) == (fitting[0], "")


@pytest.mark.parametrize(
    ("config", "name", "read_as", "sentence"),
    [
        ("krea2", "mine", "krea2", r"Krea 2 or Krea 2 Turbo.*read as Krea 2 \(guidance 5\.5, shift 1\); if it is the other, give --config krea2-turbo"),
        ("krea2", "Krea2_Turbo_fp8", "krea2-turbo", r"as its name says \(guidance 1, shift 1\); if it is the other, give --config krea2\n"),
        ("krea2", "turbocharged", "krea2", "give --config krea2-turbo"),
        ("flux2-klein", "klein-base-4b", "flux2-klein-base", r"read as FLUX\.2 klein base 4B, as its name says"),
        ("flux2-klein-9b", "klein", "flux2-klein-9b", r"guidance built in, shift 3\); .*--config flux2-klein-base-9b"),
        ("z-image", "z_image_turbo_bf16", "z-image-turbo", r"as its name says \(guidance 6, shift 3\); .*draw Z-Image-Turbo with --guidance 1 --steps 9"),
        ("z-image", "z_image", "z-image", r"read as Z-Image \(guidance 6, shift 6\); .*--config z-image-turbo; draw Z-Image-Turbo with --guidance 1 --steps 9"),
        ("flux", "flux1-turbo", "flux", None),
    ],
)
def test_what_a_file_may_be_besides_is_said_once_with_the_option_for_it(config, name, read_as, sentence, tmp_path, capsys):
    file = header(real(config, True), tmp_path / f"{name}.safetensors")
    located = locate(ExpertSpec.parse(str(file)))
    for _ in range(2):
        found = describe(located)
    said = capsys.readouterr().err
    assert found.config == read_as and (said == "" if sentence is None else re.search(sentence, said) and said.count("\n") == 1)
    if read_as != config and read_as != "z-image-turbo":  # where nothing is said, the pipeline that it joins decides
        assert found.expert.settings["is_distilled"] == described(read_as).expert.settings["is_distilled"]
    describe(located, read_as)
    assert capsys.readouterr().err == ""


def test_a_file_that_is_said_to_be_distilled_does_not_join_a_pipeline_that_is_not(folders, tmp_path):
    folder, distilled = folders / "krea2", tmp_path / "distilled"
    shutil.copytree(folder, distilled)
    index = json.loads((distilled / "model_index.json").read_text())
    (distilled / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    file = str(write(tuned("krea2"), tmp_path / "tuned.safetensors"))
    with pytest.raises(UserError, match="'tuned' is read as a model with is_distilled True, and 'krea2', which lends .* has False"):
        Ensemble.from_experts([str(folder), file], config=str(distilled), aggregator="mean")
    Ensemble.from_experts([str(distilled), file], config=str(distilled), aggregator="mean")


@pytest.mark.parametrize("config", ["sd3", "flux", "chroma", "z-image", "lumina2"])
def test_a_vae_in_a_file_gets_the_settings_of_the_family_where_an_expert_brings_none(config, tmp_path):
    own = described(config)
    file = header(dict(own.parts["vae"].state_dict()), tmp_path / "ae.safetensors")
    alone = dataclasses.replace(own.expert, vae=None, located=None, vae_component=None)
    found = describe_vae(locate(ExpertSpec.parse(str(file))), like=alone)
    assert found.settings == own.components["vae"].settings and found.model is not None


@pytest.mark.parametrize("channels", [384, 128, 1])
def test_models_that_take_other_images_are_refused_by_their_channels(channels, tmp_path):
    for diffusers, name in ((True, "x_embedder.weight"), (False, "img_in.weight")):
        file = header(real("flux", diffusers) | {name: torch.empty(3072, channels, device="meta")}, tmp_path / "real.safetensors")
        with pytest.raises(UserError, match=rf"{channels} input channels.*the 64 of FLUX.1"):
            detect_config(file)


@pytest.mark.parametrize("config", CONFIGS[6:])
def test_other_channels_are_refused(config, tmp_path):
    for diffusers in (False, True):
        tensors = real(config, diffusers)
        entry, _ = transformer_in(tensors)
        width = tensors[entry.image].shape[0]
        file = header(tensors | {entry.image: torch.empty(width, 2 * entry.channels, device="meta")}, tmp_path / "real.safetensors")
        with pytest.raises(UserError, match=rf"{2 * entry.channels} input channels.*the {entry.channels} of {entry.family}"):
            detect_config(file)


def test_a_flux2_of_another_width_asks_for_its_config(tmp_path):
    file = header(real("flux2", False) | {"img_in.weight": torch.empty(5120, 128, device="meta")}, tmp_path / "real.safetensors")
    with pytest.raises(UserError, match=r"FLUX\.2 of no size known here \(flux2, flux2-klein-9b, flux2-klein\)"):
        detect_config(file)


def test_a_transformer_of_another_size_asks_for_its_config(tmp_path):
    file = write(qwen_image_transformer(0), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="input channels|weights and config|lacks"):
        describe_expert(ExpertSpec.parse(str(file)))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["transformer_blocks.0.attn1.to_q.weight"], "diffusers' names.*give its folder"),
        (["cap_embedder.1.weight", "x_embedder.weight", "layers.0.adaLN_modulation.1.weight", "clip_text_pooled_proj.0.weight"], "is a NewBie model"),
        (["cap_embedder.1.weight", "layers.0.adaLN_modulation.0.weight", "x_embedder.weight", "siglip_embedder.1.weight"], "is a Z-Image-Omni model"),
        (["distilled_guidance_layer.in_proj.weight", "img_in_patch.weight", "nerf_image_embedder.embedder.0.weight"], "is a Chroma1-Radiance model"),
        (["double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight", "img_in.weight", "content_mode_blocks.0.a"], "is a FLUX.3 model"),
        (["control_layers.0.after_proj.weight", "control_all_x_embedder.2-1.weight"], "is a ControlNet"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "ControlNet"),
        (["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "time_text_embed.addition_t_embedding.weight"], "Qwen-Image-Layered"),
    ],
)
def test_others_are_named(names, sentence):
    with pytest.raises(UserError, match=sentence):
        layout_of(names, "x.safetensors")
