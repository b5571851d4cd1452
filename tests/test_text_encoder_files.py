"""Text encoders and VAEs from files of their own, as ComfyUI's users have them: the same ensemble as that of the whole folder, to the bit."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from gguf_writing import write_gguf
from original_layout import _vae as original_vae
from PIL import Image
from safetensors.torch import save_file
from scaled_weights import SPELLINGS, stored
from tiny import ONE_LEVEL, sd_pipeline, sdxl_pipeline, text_encoder
from tiny_chroma import CHROMA_SMALL, chroma_pipeline
from tiny_flux2 import FLUX2_SMALL, flux2_pipeline, klein_pipeline, mistral_encoder, patched_vae
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_qwen_image_21 import QWEN_IMAGE_21_SMALL, qwen_image_21_pipeline
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    SD3_SMALL,
    flux_pipeline,
    frame_vae,
    qwen_image_pipeline,
    sd3_pipeline,
)
from tiny_transformers import vae as flow_vae
from tiny_z_image import Z_IMAGE_SMALL, z_image_pipeline
from transformers import T5Config, T5EncoderModel

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.experts.donor import DonorSpec, lacks
from afa.experts.expert import Expert
from afa.experts.lending import load_donor
from afa.experts.locate import locate
from afa.experts.single_file import config_folder
from afa.experts.spec import ExpertSpec
from afa.experts.vae import describe_vae
from afa.fingerprint import saved_fingerprint

PIPELINES = {
    "sd": functools.partial(sd_pipeline, **ONE_LEVEL),
    "sdxl": sdxl_pipeline,
    "sd3": functools.partial(sd3_pipeline, **SD3_SMALL),
    "flux": functools.partial(flux_pipeline, **FLUX_SMALL),
    "flux2": functools.partial(flux2_pipeline, **FLUX2_SMALL),
    "klein": functools.partial(klein_pipeline, **FLUX2_SMALL),
    "chroma": functools.partial(chroma_pipeline, **CHROMA_SMALL),
    "z-image": functools.partial(z_image_pipeline, **Z_IMAGE_SMALL),
    "qwen-image": functools.partial(qwen_image_pipeline, **QWEN_IMAGE_SMALL),
    "qwen-image-2.1": functools.partial(qwen_image_21_pipeline, **QWEN_IMAGE_21_SMALL),
    "krea2": functools.partial(krea2_pipeline, **KREA2_SMALL),
    "lumina2": functools.partial(lumina2_pipeline, **LUMINA2_SMALL),
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = (".safetensors", ".bin")


def save(tensors, path):
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def encoders_of(pipe):
    return {name: pipe.components[name] for name in ENCODERS if pipe.components.get(name) is not None}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Of a family, made once: its whole folder, a frame without weights, and each part's file."""
    made = {}

    def of(family):
        if family not in made:
            root, pipe = tmp_path_factory.mktemp(family), PIPELINES[family](0)
            pipe.save_pretrained(root / "whole")
            shutil.copytree(root / "whole", root / "frame", ignore=lambda _, names: [name for name in names if name.endswith(WEIGHTS)])
            denoiser = "unet" if "unet" in pipe.components else "transformer"
            files = {name: save(encoder.state_dict(), root / f"{name}.safetensors") for name, encoder in encoders_of(pipe).items()}
            files["vae"] = save(pipe.vae.state_dict(), root / "vae.safetensors")
            files["model"] = save(pipe.components[denoiser].state_dict(), root / "model.safetensors")
            if family == "lumina2":  # whose transformer is read from its folder only
                files["model"] = str(root / "whole" / denoiser)
            made[family] = root, pipe, files
        return made[family]

    return of


def texts(files):
    return [files[name] for name in reversed(ENCODERS) if name in files]  # in any order


def from_files(root, files, **changes):
    given = {"text_encoders": texts(files), "vae": files["vae"], "frame": str(root / "frame"), "config": str(root / "frame")}
    return Ensemble.from_experts([f"own={files['model']}"], aggregator="mean", placement="out", **{**given, **changes})


def draw(ensemble):
    pipe = ensemble.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red bicycle", num_inference_steps=1, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(0)).images


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", PIPELINES)
def test_an_ensemble_of_separate_files_is_that_of_the_folder_to_the_bit(family, parts):
    root, _, files = parts(family)
    whole = Ensemble.from_experts([f"own={root / 'whole'}"], aggregator="mean", placement="out")
    separate = from_files(root, files)
    assert len(separate.text_encoders) == len(whole.text_encoders) > 0
    assert all(same(one, other) for one, other in zip(separate.text_encoders, whole.text_encoders, strict=True))
    assert same(separate.frame.vae, whole.frame.vae)
    assert (draw(separate) == draw(whole)).all()


def loaded(root, files, frame=None):
    """The text encoders of files, in the pipeline's order."""
    return load_donor(DonorSpec(str(frame or root / "frame"), tuple(texts(files)), files["vae"]), None, None).text_encoders


@torch.no_grad()
def states(encoder):
    """Of every layer, for some tokens."""
    return encoder(input_ids=torch.arange(5, 13)[None], attention_mask=torch.ones(1, 8), output_hidden_states=True).hidden_states


def changed(parts, tmp_path, family, rename, name="text_encoder", more=()):
    """The files of a family with one text encoder under other names. rename: (name) -> another, or None to leave it out."""
    root, pipe, files = parts(family)
    state = encoders_of(pipe)[name].state_dict()
    renamed = {new: tensor for old, tensor in state.items() if (new := rename(old)) is not None}
    return root, pipe, {**files, name: save({**renamed, **dict(more)}, tmp_path / "renamed.safetensors")}


LANGUAGE = ("klein", "z-image", "qwen-image", "qwen-image-2.1", "krea2", "lumina2", "flux2")
BEGIN = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("family", LANGUAGE)
def test_whatever_stands_before_a_language_models_names_it_is_the_same_model(family, prefix, parts, tmp_path):
    def rename(name):
        plain = BEGIN.sub("", name)
        if plain.startswith(("visual.", "vision_tower.", "multi_modal_projector.")):
            return plain  # as ComfyUI has them
        return plain if plain.startswith("lm_head") else f"{prefix}{plain}"

    root, pipe, files = changed(parts, tmp_path, family, rename)
    assert same(loaded(root, files)[0], pipe.text_encoder)


def test_clips_names_may_lack_text_model_and_have_openclips_projection(parts, tmp_path):
    bare = lambda name: re.sub(r"^text_model\.", "", name)  # noqa: E731
    root, pipe, files = changed(parts, tmp_path, "sdxl", bare)
    assert same(loaded(root, files)[0], pipe.text_encoder)
    root, pipe, files = changed(parts, tmp_path, "sdxl", lambda name: f"text_model.{bare(name)}" if "projection" not in name else name, "text_encoder_2")
    assert same(loaded(root, files)[1], pipe.text_encoder_2)
    projection = {"text_projection": pipe.text_encoder_2.text_projection.weight.T.contiguous()}
    root, pipe, files = changed(parts, tmp_path, "sdxl", lambda name: None if "projection" in name else name, "text_encoder_2", projection)
    assert same(loaded(root, files)[1], pipe.text_encoder_2)


OPEN_CLIP = (
    (r"^(text_model\.)?embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^(text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^(text_model\.)?final_layer_norm\.", "ln_final."),
    (r"^(text_model\.)?encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def test_clip_g_under_openclips_names_is_the_same_model(parts, tmp_path):
    root, _, files = parts("sdxl")
    encoder = text_encoder(50, width=24, projected=True, projection_dim=24)  # OpenCLIP's projections are square
    state, found = dict(encoder.state_dict()), {}
    for name, tensor in state.items():
        for old, new in OPEN_CLIP:
            name = re.sub(old, new, name)
        found[name] = tensor
    for layer in range(2):
        for kind in ("weight", "bias"):
            names = [f"transformer.resblocks.{layer}.self_attn.{one}_proj.{kind}" for one in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([found.pop(name) for name in names])
    found["text_projection"] = found.pop("text_projection.weight").T
    save({f"{name}": tensor for name, tensor in found.items() if "position_ids" not in name}, tmp_path / "clip_g.safetensors")
    frame = tmp_path / "frame"
    shutil.copytree(root / "frame", frame)
    settings = json.loads((frame / "text_encoder_2/config.json").read_text())
    (frame / "text_encoder_2/config.json").write_text(json.dumps({**settings, "projection_dim": 24}))
    assert same(loaded(root, {**files, "text_encoder_2": str(tmp_path / "clip_g.safetensors")}, frame)[1], encoder)


@pytest.mark.parametrize(("family", "name"), [("flux", "text_encoder_2"), ("sd3", "text_encoder_3"), ("chroma", "text_encoder")])
def test_t5_may_have_its_embedding_by_either_name(family, name, parts, tmp_path):
    for kept in ("shared.weight", "encoder.embed_tokens.weight"):
        state = {"shared.weight": None, "encoder.embed_tokens.weight": None, kept: kept}
        root, pipe, files = changed(parts, tmp_path, family, lambda name, state=state: state.get(name, name), name)
        assert same(loaded(root, files)[list(encoders_of(pipe)).index(name)], pipe.components[name])


@pytest.mark.parametrize("family", ["klein", "qwen-image", "qwen-image-2.1", "flux2"])
def test_what_texts_do_not_pass_through_may_be_left_out_of_a_file(family, parts, tmp_path):
    left_out = ("lm_head", "vision_tower", "multi_modal_projector")  # Qwen's files are told by their vision part
    root, pipe, files = changed(parts, tmp_path, family, lambda name: None if any(part in name for part in left_out) else name)
    (encoder,) = loaded(root, files)
    tied = encoder.config.tie_word_embeddings
    assert not any("vision_tower" in name or ("lm_head" in name and not tied) for name in encoder.state_dict())
    assert encoder.left_out == files["text_encoder"] or tied
    assert all(torch.equal(one, other) for one, other in zip(states(encoder), states(pipe.text_encoder), strict=True))


def test_flux_2s_text_encoder_may_end_with_the_last_layer_that_is_read(parts, tmp_path):
    root, _, files = parts("flux2")
    encoder = mistral_encoder(0, num_hidden_layers=32)
    torch.nn.init.uniform_(encoder.model.language_model.norm.weight, 0.5, 2.0)
    longer = {name: tensor for name, tensor in encoder.state_dict().items() if "lm_head" not in name}
    frame = tmp_path / "frame"
    shutil.copytree(root / "frame", frame)
    encoder.config.save_pretrained(frame / "text_encoder")
    found = []
    for last in (32, 30):
        beyond = [f"layers.{index}." for index in range(last, 32)] + (["language_model.norm."] if last < 32 else [])
        kept = {name: tensor for name, tensor in longer.items() if not any(part in name for part in beyond)}
        given = {**files, "text_encoder": save(kept, tmp_path / f"{last}.safetensors")}
        (made,) = loaded(root, given, frame)
        assert made.config.text_config.num_hidden_layers == last
        found.append(states(made))
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in (10, 20, 30))
    kept = {name: tensor for name, tensor in longer.items() if not re.search(r"layers\.(29|3\d)\.", name)}
    with pytest.raises(UserError, match=r"29 layers.*expects 32"):
        loaded(root, {**files, "text_encoder": save(kept, tmp_path / "29.safetensors")}, frame)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("family", "name"), [("flux", "text_encoder_2"), ("z-image", "text_encoder"), ("qwen-image", "text_encoder")])
def test_scaled_fp8_is_its_numbers_times_its_scales(family, name, spelling, parts, tmp_path):
    root, pipe, files = parts(family)
    state = {name: tensor.clone() for name, tensor in encoders_of(pipe)[name].state_dict().items() if name != "encoder.embed_tokens.weight"}
    found, metadata, wanted = stored(state, spelling=spelling)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, tmp_path / "fp8.safetensors", metadata)
    made = loaded(root, {**files, name: str(tmp_path / "fp8.safetensors")})[list(encoders_of(pipe)).index(name)]
    assert all(torch.equal(made.state_dict()[name], tensor.float()) for name, tensor in wanted.items())


def test_plain_fp8_is_read_as_it_is(parts, tmp_path):
    root, pipe, files = parts("flux")
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pipe.text_encoder_2.state_dict().items()}
    made = loaded(root, {**files, "text_encoder_2": save(state, tmp_path / "t5xxl_fp8_e4m3fn.safetensors")})[1]
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in made.state_dict().items())


LLAMA_CPP = {
    "T5": (
        (r"^shared\.", "token_embd."),
        (r"^encoder\.embed_tokens\..*", ""),
        (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
        (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
        (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"enc.blk.\1.attn_"),
        (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
        (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
        (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
        (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"enc.blk.\1.ffn_up."),
        (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
    ),
    "Qwen3": (
        (r"^embed_tokens\.", "token_embd."),
        (r"^norm\.", "output_norm."),
        (r"^layers\.(\d+)\.self_attn\.([qk])_norm\.", r"blk.\1.attn_\2_norm."),
        (r"^layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blk.\1.attn_\2."),
        (r"^layers\.(\d+)\.self_attn\.o_proj\.", r"blk.\1.attn_output."),
        (r"^layers\.(\d+)\.input_layernorm\.", r"blk.\1.attn_norm."),
        (r"^layers\.(\d+)\.post_attention_layernorm\.", r"blk.\1.ffn_norm."),
        (r"^layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"blk.\1.ffn_\2."),
    ),
}


def llama_cpp(kind):
    def rename(name):
        for old, new in LLAMA_CPP[kind]:
            name = re.sub(old, new, name)
        return name or None

    return rename


def test_gguf_of_t5_and_qwen3_under_llama_cpps_names(parts, tmp_path):
    root, pipe, files = parts("z-image")
    rename = llama_cpp("Qwen3")
    state = {rename(name): tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    given = {**files, "text_encoder": str(write_gguf(tmp_path / "qwen3.gguf", state))}
    assert same(loaded(root, given)[0], pipe.text_encoder)
    # the real T5 has gates, as its files do
    settings = {"vocab_size": 32, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    encoder = T5EncoderModel(T5Config(**settings)).eval()
    rename = llama_cpp("T5")
    state = {new: tensor for name, tensor in encoder.state_dict().items() if (new := rename(name))}
    root, _, files = parts("chroma")
    shutil.copytree(root / "frame", tmp_path / "frame")
    encoder.config.save_pretrained(tmp_path / "frame/text_encoder")
    given = {**files, "text_encoder": str(write_gguf(tmp_path / "t5.gguf", state))}
    assert same(loaded(root, given, frame=tmp_path / "frame")[0], encoder)


def test_gguf_of_others_is_refused_by_what_it_is(parts, tmp_path):
    root, _, files = parts("lumina2")
    state = {"token_embd.weight": torch.zeros(4, 4), "blk.0.attn_q.weight": torch.zeros(4, 4), "blk.0.post_ffw_norm.weight": torch.zeros(4)}
    with pytest.raises(UserError, match="llama.cpp's names of a model that is not read"):
        from_files(root, {**files, "text_encoder": str(write_gguf(tmp_path / "gemma.gguf", state))})


# VAEs


def publishers_flux2(vae):
    """FLUX.2's autoencoder: the original names, with the convolutions around the latents inside encoder and decoder."""
    state = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("bn.")}
    renamed = original_vae(SimpleNamespace(state_dict=lambda: state, decoder=vae.decoder))
    renamed = {re.sub(r"^quant_conv", "encoder.quant_conv", re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name)): t for name, t in renamed.items()}
    return renamed | {name: tensor for name, tensor in vae.state_dict().items() if name.startswith("bn.")}


WAN = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda found: f".middle.{2 * int(found[1])}."),
    (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda found: f"decoder.upsamples.{4 * int(found[1]) + int(found[2])}."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f"decoder.upsamples.{4 * int(found[1]) + 3}."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"(\d)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(\d)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def publishers_wan(vae):
    """Wan's VAE, which Qwen-Image and Krea 2 have."""
    found = {}
    for name, tensor in vae.state_dict().items():
        for old, new in WAN:
            name = re.sub(old, new, name)
        found[name] = tensor
    return found


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("family", ["flux2", "qwen-image", "z-image"])
def test_a_vae_under_its_publishers_names_is_the_same_model(family, prefix, parts, tmp_path):
    root, _, _ = parts(family)
    made = {
        "flux2": lambda: (patched_vae(3), publishers_flux2),
        "qwen-image": lambda: (frame_vae(3, num_res_blocks=2, dim_mult=[1, 2, 4, 4]), publishers_wan),  # the converter knows this shape only
        "z-image": lambda: (flow_vae(3), original_vae),
    }
    vae, publish = made[family]()
    frame = tmp_path / "frame"
    shutil.copytree(root / "frame", frame)
    vae.save_config(frame / "vae")
    file = save({f"{prefix}{name}": tensor for name, tensor in publish(vae).items()}, tmp_path / "ae.safetensors")
    found = describe_vae(locate(ExpertSpec("vae", file)), config=str(frame)).load(torch.float32)
    assert same(found, vae)


def test_a_vae_of_another_kind_is_refused_with_both(parts, tmp_path):
    for family, other, told in (("flux2", "qwen-image", "Wan's names"), ("qwen-image", "z-image", "original autoencoder's names")):
        root, _, _ = parts(family)
        vae, publish = {"qwen-image": (frame_vae(3, num_res_blocks=2), publishers_wan), "z-image": (flow_vae(3), original_vae)}[other]
        file = save(publish(vae), tmp_path / f"{other}.safetensors")
        with pytest.raises(UserError, match=told):
            describe_vae(locate(ExpertSpec("vae", file)), config=str(root / "frame"))


# Frames, saving, and what is refused


def test_a_saved_ensemble_finds_its_parts_again_and_a_bundle_brings_them(parts, tmp_path):
    root, _, files = parts("flux")
    ensemble = from_files(root, files)
    expected = draw(ensemble)
    for bundle in (False, True):
        ensemble.save(tmp_path / f"saved{bundle}", bundle=bundle)
        manifest = json.loads((tmp_path / f"saved{bundle}/afa.json").read_text())
        assert {"text_encoder", "text_encoder_2", "vae", "frame"} <= manifest["frame"].keys()
        assert (draw(Ensemble.load(tmp_path / f"saved{bundle}")) == expected).all()
    moved = tmp_path / "elsewhere"
    (tmp_path / "savedTrue").rename(moved)
    assert (draw(Ensemble.load(moved)) == expected).all()
    assert not [place for place in json.loads((moved / "afa.json").read_text())["frame"].values() if ".." in place]
    hashes = saved_fingerprint(moved)
    assert any("text encoder" in name for name in hashes)
    (moved / "frame/text_encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"frame.text_encoder is .*neither the name"):
        Ensemble.load(moved)


def test_the_configs_that_ship_and_clips_tokenizer_are_enough_for_a_u_net(tmp_path, parts):
    root, _, files = parts("sd")
    configs = tmp_path / "configs"  # as afa ships them: no tokenizers, no weights
    shutil.copytree(root / "frame", configs, ignore=lambda _, names: [name for name in names if name == "tokenizer"])
    encoder = text_encoder(0, vocab_size=49408)  # of the whole vocabulary
    encoder.config.save_pretrained(configs / "text_encoder")
    clip = save(encoder.state_dict(), tmp_path / "clip_l.safetensors")
    made = Ensemble.from_experts([files["model"]], config=str(configs), text_encoders=[clip], vae=files["vae"], aggregator="mean", placement="out")
    assert type(made.frame.tokenizers[0]).__name__.startswith("CLIPTokenizer")
    made.save(tmp_path / "saved")
    assert same(Ensemble.load(tmp_path / "saved").text_encoders[0], made.text_encoders[0])


def test_a_hub_id_is_enough_as_frame_and_no_weights_of_it_are_needed(parts, tmp_path, monkeypatch):
    root, _, files = parts("z-image")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--model"
    shutil.copytree(root / "frame", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = from_files(root, files, frame="org/model")
    expected = draw(made)
    made.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/afa.json").read_text())["frame"]["frame"] == f"org/model@{commit}"
    assert (draw(Ensemble.load(tmp_path / "saved")) == expected).all()
    assert any("the frame" in name for name in saved_fingerprint(tmp_path / "saved"))
    made.save(tmp_path / "bundle", bundle=True)
    shutil.rmtree(repo)
    assert (draw(Ensemble.load(tmp_path / "bundle")) == expected).all()
    with pytest.raises(UserError, match="as a hub id it could not be loaded"):
        from_files(root, files, frame="org/model")


def test_everything_that_is_missing_is_named_at_once_with_the_options_and_the_hub_id(parts, tmp_path):
    root, _, files = parts("flux")
    with pytest.raises(UserError) as told:
        from_files(root, files, text_encoders=files["text_encoder"].split(), vae=None)
    for word in ("'own'", "T5 of width 24", "a VAE", "--text-encoder FILE", "--vae FILE", "text_encoders="):
        assert word in str(told.value)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(config_folder("flux") / "transformer"))
    said = lacks(Expert("mine", model))
    for word in ("CLIP of width 768", "T5 of width 4,096", "the tokenizers", "a VAE", "--frame black-forest-labs/FLUX.1-dev"):
        assert word in said


def test_a_file_that_has_no_place_is_refused_by_what_it_is(parts, tmp_path):
    root, _, files = parts("flux")
    other, lumina = parts("sd3")[2], parts("lumina2")[2]
    for given, told in (
        ([lumina["text_encoder"]], r"a Gemma 2 of width 24, and a FluxPipeline reads a CLIP of width 16 and a T5 of width 24"),
        ([other["text_encoder_3"]], "a T5 of width 48"),
        ([*texts(files), files["text_encoder"]], "both a CLIP of width 16"),
        ([files["vae"]], "is a VAE; give it as --vae"),
        ([files["model"]], "is a transformer of a diffusion model"),
        ([str(tmp_path / "nowhere")], "no such file"),
        ([str(tmp_path)], "cannot be read|no weights|holds no"),
        (["org/model"], "no such file"),
    ):
        with pytest.raises(UserError, match=told):
            from_files(root, files, text_encoders=given)
    pickled = tmp_path / "clip_l.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(UserError, match="convert pickles first"):
        from_files(root, files, text_encoders=[str(pickled)])


def test_a_text_encoder_of_other_shapes_is_refused_with_both_values(parts, tmp_path):
    root, _, files = parts("chroma")
    for change, told in (({"num_layers": 3}, r"3 layers.*expects 2"), ({"d_ff": 64}, "has shape"), ({"vocab_size": 40}, "has shape")):
        settings = {"vocab_size": 32, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, **change}
        file = save(T5EncoderModel(T5Config(**settings)).state_dict(), tmp_path / "t5.safetensors")
        with pytest.raises(UserError, match=told):
            from_files(root, {**files, "text_encoder": file})


def test_a_projection_that_the_pipeline_reads_may_not_be_left_out(parts, tmp_path):
    root, _, files = changed(parts, tmp_path, "sdxl", lambda name: None if "projection" in name else name, "text_encoder_2")
    with pytest.raises(UserError, match="text_projection.weight"):
        from_files(root, files)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused_with_both(parts, tmp_path):
    root, _, files = parts("flux")
    frame = tmp_path / "frame"
    shutil.copytree(root / "frame", frame)
    config = json.loads((frame / "text_encoder_2/config.json").read_text())
    (frame / "text_encoder_2/config.json").write_text(json.dumps({**config, "vocab_size": 8}))
    with pytest.raises(UserError, match=r"has 12 tokens.*reads 8"):
        from_files(root, files, frame=str(frame))


def test_text_encoders_that_nobody_needs_are_refused(parts):
    root, _, files = parts("flux")
    with pytest.raises(UserError, match="all of these bring their own"):
        Ensemble.from_experts([str(root / "whole")], text_encoders=texts(files))


def test_a_folder_of_a_text_encoder_serves_as_its_file_does(parts):
    root, pipe, files = parts("flux")
    given = {**files, **{name: str(root / "whole" / name) for name in encoders_of(pipe)}}
    assert all(same(one, other) for one, other in zip(loaded(root, given), encoders_of(pipe).values(), strict=True))


def test_the_commands_take_the_parts_as_the_library_does(parts, tmp_path, capsys):
    root, pipe, files = parts("flux")
    given = ["--text-encoder", *texts(files), "--vae", files["vae"], "--frame", str(root / "frame"), "--config", str(root / "frame")]
    assert main(["inspect", f"own={files['model']}", *given, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["experts"]
    assert [one["class"] for one in shown["text_encoders"]] == [type(one).__name__ for one in encoders_of(pipe).values()]
    assert shown["vae"]["class"] == "AutoencoderKL"
    drawn = []
    for name, source in (("whole", [str(root / "whole")]), ("parts", [files["model"], *given])):
        small = "--prompt a --steps 1 --height 64 --width 64 --device cpu".split()
        assert main(["generate", *source, *small, "--output", str(tmp_path / name)]) == 0
        drawn.append(np.asarray(Image.open(next((tmp_path / name).glob("*.png")))))
    assert (drawn[0] == drawn[1]).all()
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    capsys.readouterr()
    screened = ["screen", f"a={files['model']}", f"b={files['model']}", "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "64", "--dry-run", "--json"]
    assert main([*screened, *given]) == 0
    capsys.readouterr()
    assert main([*screened, "--config", str(root / "frame")]) == 2
    assert "lacks the text encoder CLIP of width 16" in capsys.readouterr().err
