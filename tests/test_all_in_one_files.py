"""Files with text encoders and a VAE beside the transformer, as ComfyUI saves them and Stability published SD 3: the ensemble of the folders."""

import json
import shutil

import pytest
import torch
from original_layout import _vae as original_vae
from safetensors.torch import load_file, save_file
from scaled_weights import SPELLINGS, stored
from test_text_encoder_files import BEGIN, LANGUAGE, draw, encoders_of, parts, same  # noqa: F401 (a fixture)
from test_transformer_files import published_state

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.experts.donor import lacks
from afa.experts.load import load_expert
from afa.explanation.attention import find_words
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

# a family -> what ComfyUI calls its text encoders
TEXTS = {
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
    "flux2": ("mistral3_24b",),
    "klein": ("qwen3_4b",),
    "chroma": ("t5xxl",),
    "z-image": ("qwen3_4b",),
    "qwen-image": ("qwen25_7b",),
    "qwen-image-2.1": ("qwen3vl_8b",),
    "krea2": ("qwen3vl_4b",),
    "lumina2": ("gemma2_2b",),
}
SEES = ("visual.", "vision_tower.", "multi_modal_projector.", "lm_head.")


def text_of(family, name, encoder):
    """A text encoder's tensors as ComfyUI's CheckpointSave writes them."""
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if family in LANGUAGE:
        plain = {BEGIN.sub("", name): tensor for name, tensor in state.items()}
        state = {name if name.startswith(SEES) else f"model.{name}": tensor for name, tensor in plain.items()}
    else:
        state.pop("encoder.embed_tokens.weight", None)  # T5's is tied
    beside = {f"text_encoders.{name}.logit_scale": torch.tensor(4.6055), "text_encoders.spiece_model": torch.zeros(4, dtype=torch.uint8)}
    return {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in state.items()} | beside


def vae_of(family, vae):
    """As the publishers name it, where any width can be read; under the prefixes that ComfyUI has."""
    known = family in ("sd3", "flux", "chroma", "z-image", "lumina2")
    names = original_vae(vae) if known else dict(vae.state_dict())
    return {f"{'first_stage_model.' if family == 'sd3' else 'vae.'}{name}": tensor for name, tensor in names.items()}


def all_in_one(family, pipe, path, left_out=(), vae=True, texts=None):
    """texts: tensors in place of the text encoders'"""
    named = zip(TEXTS[family], encoders_of(pipe).values(), strict=True)
    own = {key: tensor for name, encoder in named if name not in left_out for key, tensor in text_of(family, name, encoder).items()}
    model = {f"model.diffusion_model.{name}": tensor for name, tensor in published_state(family, pipe.transformer).items()}
    if family == "qwen-image":
        model = {f"model.diffusion_model.{name}": tensor for name, tensor in pipe.transformer.state_dict().items()}
    tensors = model | (own if texts is None else texts) | (vae_of(family, pipe.vae) if vae else {})
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def made(root, *files, **changes):
    """An ensemble of files, with the configs and tokenizers of a folder without weights."""
    given = {"frame": str(root / "frame"), "config": str(root / "frame"), "aggregator": "mean", "placement": "out"}
    return Ensemble.from_experts([f"e{index}={file}" for index, file in enumerate(files)], **{**given, **changes})


@pytest.mark.parametrize("family", TEXTS)
def test_an_ensemble_of_all_in_one_files_is_that_of_the_folders_to_the_bit(family, parts, tmp_path):  # noqa: F811
    root, pipe, _ = parts(family)
    files = [all_in_one(family, pipe, tmp_path / f"{name}.safetensors") for name in "ab"]
    whole = Ensemble.from_experts([f"e{index}={root / 'whole'}" for index in range(2)], aggregator="mean", placement="out")
    ensemble = made(root, *files)
    assert len(ensemble.text_encoders) == len(whole.text_encoders) == len(TEXTS[family])
    assert all(same(one, other) for one, other in zip(ensemble.text_encoders, whole.text_encoders, strict=True))
    assert same(ensemble.frame.vae, whole.frame.vae)
    expected = draw(whole)
    assert (draw(ensemble) == expected).all()
    one, other = ensemble.experts
    assert all(first is second for first, second in zip(one.text_encoders, other.text_encoders, strict=True))  # in memory once
    ensemble.save(tmp_path / "saved")
    assert (draw(Ensemble.load(tmp_path / "saved")) == expected).all()
    ensemble.save(tmp_path / "bundle", bundle=True)
    for file in files:
        (tmp_path / file).unlink()
    assert (draw(Ensemble.load(tmp_path / "bundle")) == expected).all()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_text_encoders_in_8_bits_are_their_numbers_times_their_scales(spelling, parts, tmp_path):  # noqa: F811
    """Beside a transformer without scales, and under marks of their own."""
    root, pipe, _ = parts("sd3")
    own, wanted, metadata = {}, {}, {}
    for name, encoder in zip(TEXTS["sd3"], encoders_of(pipe).values(), strict=True):
        texts = text_of("sd3", name, encoder)
        if name == "t5xxl":
            texts, metadata, wanted = stored(texts, spelling=spelling, prefix="text_encoders.t5xxl.transformer.")
        own |= texts
    file = all_in_one("sd3", pipe, tmp_path / "plain.safetensors", texts=own)
    save_file(load_file(file), file, metadata)
    t5 = made(root, file).experts[0].text_encoders[2].state_dict()
    wanted = {name.partition(".transformer.")[2]: tensor.float() for name, tensor in wanted.items() if ".transformer." in name}
    assert all(torch.equal(t5[name], tensor) for name, tensor in wanted.items())
    exact = pipe.text_encoder_3.state_dict()
    assert any(not torch.equal(t5[name], exact[name]) for name in wanted)
    assert all(torch.allclose(t5[name], exact[name], rtol=2**-3, atol=float(exact[name].abs().max()) / 256) for name in wanted)


def test_text_encoders_in_plain_fp8_are_read_as_they_are(parts, tmp_path):  # noqa: F811
    """As sd3_medium_incl_clips_t5xxlfp8.safetensors has its T5."""
    root, pipe, _ = parts("sd3")
    own = {}
    for name, encoder in zip(TEXTS["sd3"], encoders_of(pipe).values(), strict=True):
        texts = text_of("sd3", name, encoder)
        own |= {key: tensor.to(torch.float8_e4m3fn) if name == "t5xxl" and tensor.is_floating_point() else tensor for key, tensor in texts.items()}
    t5 = made(root, all_in_one("sd3", pipe, tmp_path / "fp8.safetensors", texts=own)).experts[0].text_encoders[2]
    assert all(torch.equal(tensor, pipe.text_encoder_3.state_dict()[name].to(torch.float8_e4m3fn).float()) for name, tensor in t5.state_dict().items())


def test_without_t5_prompts_are_read_by_the_clips_as_diffusers_does(parts, tmp_path, capsys):  # noqa: F811
    """As sd3_medium_incl_clips.safetensors. diffusers' pipeline takes text_encoder_3=None."""
    root, pipe, files = parts("sd3")
    file = all_in_one("sd3", pipe, tmp_path / "incl_clips.safetensors", left_out=["t5xxl"])
    ensemble = made(root, file)
    assert "has no T5 of width 48" in capsys.readouterr().err
    clips = Ensemble.from_experts([f"e0={root / 'whole'}"], aggregator="mean", placement="out").pipeline(text_encoder_3=None, tokenizer_3=None)
    clips.set_progress_bar_config(disable=True)
    small = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    assert len(ensemble.text_encoders) == 2
    assert (draw(ensemble) == clips(prompt="a red bicycle", **small).images).all()
    ensemble.save(tmp_path / "saved")
    assert (draw(Ensemble.load(tmp_path / "saved")) == draw(ensemble)).all()
    whole = Ensemble.from_experts([f"e0={root / 'whole'}"], aggregator="mean", placement="out")
    given = made(root, file, text_encoders=[files["text_encoder_3"]])
    assert len(given.text_encoders) == 3 and (draw(given) == draw(whole)).all()
    assert [word.text for word in find_words(ensemble.pipeline(), "a red bicycle", 77) if word.tokens] == ["a", "red", "bicycle"]
    lent = made(root, file, all_in_one("sd3", pipe, tmp_path / "incl_t5.safetensors"))  # by the other expert
    assert len(lent.text_encoders) == 3
    assert all(encoder.left_out is None for encoder in given.experts[0].text_encoders)  # so that a student is saved as a folder


def test_what_the_user_names_goes_first_then_the_file_then_the_frame(parts, tmp_path):  # noqa: F811
    root, pipe, files = parts("flux")
    other = {name: torch.full_like(tensor, 0.01) for name, tensor in pipe.text_encoder_2.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in other.items()}, tmp_path / "other_t5.safetensors")
    changed = {key: tensor + 0.5 for key, tensor in text_of("flux", "clip_l", pipe.text_encoder).items() if tensor.is_floating_point()}
    file = all_in_one("flux", pipe, tmp_path / "clip_only.safetensors", texts=changed, vae=False)
    ensemble = made(root, file, frame=str(root / "whole"))
    clip, t5 = ensemble.experts[0].text_encoders
    assert not same(clip, pipe.text_encoder) and same(t5, pipe.text_encoder_2) and same(ensemble.frame.vae, pipe.vae)
    given = [files["text_encoder"], str(tmp_path / "other_t5.safetensors")]
    clip, t5 = made(root, file, frame=str(root / "whole"), text_encoders=given).experts[0].text_encoders
    assert same(clip, pipe.text_encoder) and torch.equal(t5.state_dict()["shared.weight"], other["shared.weight"])
    # FLUX.1's experts may have text encoders of their own: beside a folder, each keeps what it has
    joined = Ensemble.from_experts([f"a={root / 'whole'}", f"b={file}"], config=str(root / "frame"), aggregator="mean", placement="out")
    assert [encoder.of_expert for encoder in joined.text_encoders] == [[0, 1], [0, 0]]
    assert joined.experts[0].text_encoders[1] is joined.experts[1].text_encoders[1]  # in memory once
    draw(joined)


def test_experts_of_a_family_that_shares_text_encoders_read_the_first_with_a_warning(parts, tmp_path, capsys):  # noqa: F811
    root, pipe, _ = parts("z-image")
    changed = {key: tensor + 0.5 if tensor.is_floating_point() else tensor for key, tensor in text_of("z-image", "qwen3_4b", pipe.text_encoder).items()}
    files = [all_in_one("z-image", pipe, tmp_path / "a.safetensors"), all_in_one("z-image", pipe, tmp_path / "b.safetensors", texts=changed)]
    ensemble = made(root, *files)
    assert same(ensemble.text_encoders[0].encoders[0], pipe.text_encoder)
    ensemble.save(tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    told = capsys.readouterr().err
    assert f"the text_encoder in {files[1]} is not read" in told and files[0] in told
    experts = [f"a={root / 'whole'}", f"b={files[1]}"]
    beside = Ensemble.from_experts(experts, config=str(root / "frame"), aggregator="mean", placement="out")
    assert same(beside.text_encoders[0].encoders[0], pipe.text_encoder)
    assert f"the text encoders in {files[1]} are not read: expert 'a' lends its own" in capsys.readouterr().err


def without_tokenizers(root, tmp_path):
    """A folder of configs such as those that ship."""
    shutil.copytree(root / "frame", tmp_path / "configs", ignore=lambda _, names: [name for name in names if name.startswith("tokenizer")])
    return tmp_path / "configs"


def test_a_whole_file_needs_its_tokenizers_only_and_the_sentence_says_so(parts, tmp_path):  # noqa: F811
    root, pipe, _ = parts("sd3")
    file = all_in_one("sd3", pipe, tmp_path / "all.safetensors")
    alone = Ensemble.from_experts([f"own={file}"], config=str(root / "frame"), aggregator="mean", placement="out")
    assert len(alone.text_encoders) == 3  # the configs' folder has tokenizers
    bare = without_tokenizers(root, tmp_path)
    expert = load_expert(f"own={file}", config=str(bare))
    assert "lacks the tokenizers; give --frame" in lacks(expert)
    with pytest.raises(UserError, match="lacks the tokenizers; give --frame"):
        Ensemble.from_experts([expert], aggregator="mean", placement="out").pipeline()


def test_inspect_says_what_a_file_holds_and_what_it_lacks(parts, tmp_path, capsys):  # noqa: F811
    root, pipe, _ = parts("sd3")
    file = all_in_one("sd3", pipe, tmp_path / "all.safetensors")
    bare = without_tokenizers(root, tmp_path)
    assert main(["inspect", f"own={file}", "--config", str(bare), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["experts"]
    assert [text["class"] for text in shown["text_encoders"]] == [type(encoder).__name__ for encoder in encoders_of(pipe).values()]
    assert shown["vae"]["class"] == "AutoencoderKL" and "lacks the tokenizers" in shown["lacking"]
    assert main(["inspect", f"own={file}", "--config", str(bare)]) == 0
    assert "lacks the tokenizers" in capsys.readouterr().out
    assert main(["inspect", f"own={file}", "--config", str(bare), "--frame", str(root / "frame"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"][0]["lacking"] is None


def test_inspect_lends_a_transformer_the_text_encoders_of_a_whole_pipeline_as_an_ensemble_does(parts, tmp_path, capsys):  # noqa: F811
    root, _, files = parts("z-image")
    experts = [f"a={root / 'whole'}", f"b={files['model']}"]
    assert main(["inspect", *experts, "--config", str(root / "frame"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [text["same_as"] for text in found["experts"][1]["text_encoders"]] == ["a"] and found["mismatches"] == []
    Ensemble.from_experts(experts, config=str(root / "frame"), aggregator="mean", placement="out").save(tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved")]) == 0


def test_a_text_encoder_in_a_form_that_is_not_undone_is_refused_only_where_it_is_read(parts, tmp_path):  # noqa: F811
    root, pipe, files = parts("flux")
    own = text_of("flux", "clip_l", pipe.text_encoder) | text_of("flux", "t5xxl", pipe.text_encoder_2)
    own["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight_scale_2"] = torch.ones(1)
    file = all_in_one("flux", pipe, tmp_path / "nvfp4.safetensors", texts=own)
    with pytest.raises(UserError, match="nvfp4"):
        made(root, file)
    assert len(made(root, file, text_encoders=[files["text_encoder_2"]]).text_encoders) == 2
    assert load_expert(file, config=str(root / "frame")).model is not None


def test_a_merge_of_them_keeps_the_text_encoders_and_the_vae_of_the_first(parts, tmp_path):  # noqa: F811
    root, pipe, _ = parts("flux")
    changed = {key: tensor + 0.5 for key, tensor in text_of("flux", "clip_l", pipe.text_encoder).items() if tensor.is_floating_point()}
    changed |= text_of("flux", "t5xxl", pipe.text_encoder_2)
    files = [all_in_one("flux", pipe, tmp_path / "a.safetensors"), all_in_one("flux", pipe, tmp_path / "b.safetensors", texts=changed)]
    merge_files(MergeSettings(files, str(tmp_path / "merged.safetensors"), config=str(root / "frame")))
    merged = made(root, tmp_path / "merged.safetensors")
    assert all(same(one, other) for one, other in zip(merged.experts[0].text_encoders, encoders_of(pipe).values(), strict=True))
    assert same(merged.frame.vae, pipe.vae)


def test_the_commands_draw_and_screen_from_all_in_one_files(parts, tmp_path, capsys):  # noqa: F811
    root, pipe, _ = parts("z-image")
    files = [f"{name}={all_in_one('z-image', pipe, tmp_path / f'{name}.safetensors')}" for name in "ab"]
    given = ["--frame", str(root / "frame"), "--config", str(root / "frame")]
    small = "--prompt a --steps 1 --height 64 --width 64 --device cpu".split()
    assert main(["generate", *files, *given, "--method", "noise_average", *small, "--output", str(tmp_path / "drawn")]) == 0
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    screened = ["screen", *files, "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "64", "--dry-run", "--json", "--config", str(root / "frame")]
    capsys.readouterr()
    assert main([*screened, "--frame", str(root / "frame")]) == 0
    assert main(screened) == 0  # the configs' folder has tokenizers
