"""What a U-Net predicts: keys, header and user are read in every layout, reach all that computes with it, and stay in what is written."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from merging_models import small_vae
from original_layout import write_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL, sd_pipeline, text_encoder
from transformers import CLIPTokenizer

from afa import Ensemble, UserError
from afa.checkpoint.manifest import read_manifest
from afa.denoiser.schedule import Schedule, kind_of, tables
from afa.experts.description import describe_expert
from afa.experts.load import load_expert
from afa.experts.prediction import Prediction, predicting, said_by_file
from afa.experts.single_file import detect_config
from afa.experts.spec import ExpertSpec
from afa.inspection import Subject, facts
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings
from afa.places import located

UNET = "model.diffusion_model."
EMPTY = torch.empty(0)
KEYS = {"none": {}, "v": {"v_pred": EMPTY}, "v and zero": {"v_pred": EMPTY, "ztsnr": EMPTY}, "zero": {"ztsnr": EMPTY}}
MEANT = {"none": ("epsilon", False), "v": ("v_prediction", False), "v and zero": ("v_prediction", True), "zero": ("epsilon", False)}
LAYOUTS = ("whole", "prefix", "bare", "diffusers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One pipeline that predicts ε, as a folder (also configs) and in every layout of a single file, without a word on what it predicts."""
    root = tmp_path_factory.mktemp("prediction")
    pipe = sd_pipeline(0, **ONE_LEVEL)
    pipe.tokenizer = CLIPTokenizer.from_pretrained(located("demo:curves/tokenizer"))  # CLIP's takes a second a time
    size = len(pipe.tokenizer)
    ids = {"bos_token_id": pipe.tokenizer.bos_token_id, "eos_token_id": pipe.tokenizer.eos_token_id, "pad_token_id": pipe.tokenizer.pad_token_id}
    pipe.text_encoder = text_encoder(vocab_size=size, **ids)
    pipe.vae = small_vae(0)
    pipe.save_pretrained(root / "configs")
    write_single_file(pipe, root / "whole.safetensors")
    whole = load_file(root / "whole.safetensors")
    unet = {name: tensor for name, tensor in whole.items() if name.startswith(UNET)}
    save_file(unet, root / "prefix.safetensors")
    save_file({name.removeprefix(UNET): tensor for name, tensor in unet.items()}, root / "bare.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in pipe.unet.state_dict().items()}, root / "diffusers.safetensors")
    return root


@pytest.fixture
def made(home, tmp_path):
    """Write a file of a layout with some keys and a header: -> its path."""

    def make(layout="whole", keys="none", header=None, name="file"):
        path = tmp_path / f"{name}.safetensors"
        metadata = {"format": "pt", **({"modelspec.prediction_type": header} if header is not None else {})}
        save_file(load_file(home / f"{layout}.safetensors") | KEYS[keys], path, metadata=metadata)
        return path

    return make


def description(path, home, given=None):
    return describe_expert(ExpertSpec.parse(str(path), given), str(home / "configs")).expert


def meaning(scheduler):
    return kind_of(scheduler), Schedule.of(scheduler).zero_snr


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_read_in_every_layout(layout, keys, made, home):
    assert meaning(description(made(layout, keys), home).scheduler) == MEANT[keys]


@pytest.mark.parametrize(("layout", "keys"), [*(("whole", keys) for keys in KEYS), *((layout, "v and zero") for layout in LAYOUTS[1:])])
def test_an_ensemble_and_its_pipeline_have_what_was_read(layout, keys, made, home):
    path = made(layout, keys)
    frame = None if layout == "whole" else str(home / "configs")
    ensemble = Ensemble.from_experts([str(path)], config=str(home / "configs"), frame=frame, aggregator="mean")
    for scheduler in (ensemble.experts[0].scheduler, ensemble.frame.scheduler, ensemble.pipeline().scheduler):
        assert meaning(scheduler) == MEANT[keys]
    if MEANT[keys][1]:
        assert ensemble.frame.scheduler.config.timestep_spacing == "trailing"
        ensemble.frame.scheduler.set_timesteps(5)
        assert int(ensemble.frame.scheduler.timesteps[0]) == 999  # where there is no signal at all


def test_a_key_that_is_ignored_is_warned_about(made, home, capsys):
    description(made("whole", "zero", name="alone"), home)
    assert "ztsnr is ignored" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["whole", "prefix", "bare", "diffusers"])
def test_keys_do_not_depend_on_a_config_being_named(shape, tmp_path):
    """At the shapes of SD 1, SD 2 and SDXL, by the header alone."""
    for config, block, width in (("sd15", 1, 768), ("sd21", 1, 1024), ("sdxl", 4, 2048)):
        tensors = {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
        tensors[f"{UNET}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(8, width)
        if shape == "diffusers":
            level = {1: 0, 4: 1}[block]
            tensors = {"conv_in.weight": torch.zeros(8, 4, 3, 3), "up_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
            tensors[f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(8, width)
        if shape == "bare":
            tensors = {name.removeprefix(UNET): tensor for name, tensor in tensors.items()}
        if shape == "whole":
            tensors["cond_stage_model.x"] = torch.zeros(1)
        for keys, found in KEYS.items():
            save_file(tensors | found, tmp_path / "file.safetensors")
            assert detect_config(tmp_path / "file.safetensors") == config
            assert said_by_file(tmp_path / "file.safetensors").type == ("v_prediction" if "v_pred" in found else None), keys


@pytest.mark.parametrize(
    ("header", "given", "config"), [("", None, "sd21"), ("v", None, "sd21"), ("epsilon", None, "sd21-base"), ("", "epsilon", "sd21-base")]
)
def test_sd2_is_read_with_the_config_of_what_it_predicts(header, given, config, tmp_path):
    tensors = {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    tensors[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(8, 1024)
    save_file(tensors, tmp_path / "file.safetensors", metadata={"modelspec.prediction_type": header})
    assert detect_config(tmp_path / "file.safetensors", given) == config


@pytest.mark.parametrize(("header", "kind"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("V-Prediction", "v_prediction"), ("", None)])
def test_the_header_says_it_where_no_key_does(header, kind, made):
    assert said_by_file(made(header=header)).type == kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_user_says_it_where_the_file_says_nothing(layout, made, home):
    assert meaning(description(made(layout), home, "v_prediction").scheduler) == ("v_prediction", False)
    assert meaning(description(made(layout, "zero"), home, "v_prediction").scheduler) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("keys", "header", "given"),
    [
        ("v", None, "epsilon"),
        ("v", "epsilon", None),
        ("v", "epsilon", "epsilon"),
        ("none", "v", "epsilon"),
        ("none", "epsilon", "v_prediction"),
        ("none", "v", None),
    ],
)
def test_contradictions_are_refused_with_both_values(keys, header, given, made, home):
    """The last: a header against the scheduler of the configs that the user names."""
    with pytest.raises(UserError, match=r"(?s)(v_prediction.*epsilon|epsilon.*v_prediction)"):
        description(made("whole", keys, header), home, given)


def test_the_user_settles_what_key_and_header_contradict_in_favour_of_the_key(made, home):
    assert meaning(description(made("whole", "v", "epsilon"), home, "v_prediction").scheduler) == ("v_prediction", False)


@pytest.mark.parametrize("header", ["sample", "score", "1"])
def test_a_header_of_an_unknown_kind_is_refused_until_the_user_says_it(header, made):
    with pytest.raises(UserError, match=header):
        said_by_file(made(header=header))
    assert said_by_file(made(header=header), "epsilon").type == "epsilon"


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max", f"{UNET}edm_std"])
def test_models_of_edms_noise_are_refused_by_name(key, home, tmp_path):
    save_file(load_file(home / "whole.safetensors") | {key: torch.zeros(1)}, tmp_path / "playground.safetensors")
    with pytest.raises(UserError, match="EDM"):
        description(tmp_path / "playground.safetensors", home)


def test_a_folder_that_says_otherwise_than_its_user_is_refused(home):
    with pytest.raises(UserError, match=r"epsilon.*v_prediction"):
        load_expert(ExpertSpec.parse(str(home / "configs"), "v_prediction"))


@pytest.mark.parametrize("layout", ["whole", "bare"])
def test_v_and_epsilon_never_count_as_alike_and_are_never_merged(layout, made, home, tmp_path):
    config = str(home / "configs")
    one, two, three = (str(made(layout, keys, name=name)) for keys, name in (("none", "a"), ("v", "b"), ("v and zero", "c")))
    for pair, word in (((one, two), "prediction_type"), ((two, one), "prediction_type"), ((two, three), "rescale_betas_zero_snr")):
        found = facts(Subject.from_sources(list(pair), config, _mean(), None))
        assert word in found["mismatches"][0]
        with pytest.raises(UserError, match=word):
            merge_files(MergeSettings(experts=list(pair), output=str(tmp_path / "mixed.safetensors"), config=config))
        with pytest.raises(UserError, match=word):
            Ensemble.from_experts(list(pair), config=config, frame=None if layout == "whole" else config)
    assert not (tmp_path / "mixed.safetensors").exists()


@pytest.mark.parametrize("layout", ["whole", "bare"])
@pytest.mark.parametrize("keys", ["none", "v", "v and zero"])
def test_a_merge_of_files_that_agree_says_what_they_say(layout, keys, made, home, tmp_path):
    files = [str(made(layout, keys, name=name)) for name in "ab"]
    merged = tmp_path / "merged.safetensors"
    merge_files(MergeSettings(experts=files, output=str(merged), config=str(home / "configs")))
    with safe_open(merged, "pt") as file:
        names, header = set(file.keys()), file.metadata()["modelspec.prediction_type"]
    with safe_open(files[0], "pt") as file:
        assert names == set(file.keys())  # a U-Net alone stays alone, in its own layout
    assert header == {"epsilon": "epsilon", "v_prediction": "v"}[MEANT[keys][0]]
    assert meaning(description(merged, home).scheduler) == MEANT[keys]
    first = load_file(files[0])
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_file(merged).items())


def test_what_the_user_said_is_written_into_the_merge(made, home, tmp_path):
    files, merged = [str(made(name=name)) for name in "ab"], tmp_path / "merged.safetensors"
    merge_files(MergeSettings(experts=files, output=str(merged), config=str(home / "configs"), prediction_type="v_prediction"))
    assert said_by_file(merged) == Prediction("v_prediction", False)


@pytest.mark.parametrize("zero", [False, True])
def test_a_single_file_from_folders_and_a_folder_from_single_files_say_it(zero, home, tmp_path):
    folder = tmp_path / "v"
    shutil.copytree(home / "configs", folder)
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | changes))
    shutil.copytree(folder, tmp_path / "w")
    merge_files(MergeSettings(experts=[str(folder), str(tmp_path / "w")], output=str(tmp_path / "file.safetensors")))
    assert said_by_file(tmp_path / "file.safetensors") == Prediction("v_prediction", zero)
    back = MergeSettings(experts=[f"{name}={tmp_path / 'file.safetensors'}" for name in "ab"], output=str(tmp_path / "back"), config=str(home / "configs"))
    merge_files(back)
    assert meaning(load_expert(str(tmp_path / "back")).scheduler) == ("v_prediction", zero)


@pytest.mark.parametrize("layout", ["whole", "bare"])
@pytest.mark.parametrize(("keys", "given"), [("v and zero", None), ("none", "v_prediction")])
def test_saved_ensembles_of_such_experts_load_again_and_check(layout, keys, given, made, home, tmp_path):
    frame = None if layout == "whole" else str(home / "configs")
    ensemble = Ensemble.from_experts([str(made(layout, keys))], config=str(home / "configs"), frame=frame, prediction_type=given, aggregator="mean")
    ensemble.save(tmp_path / "saved")
    assert read_manifest(tmp_path / "saved").experts[0].prediction_type == "v_prediction"
    again = Ensemble.load(tmp_path / "saved")
    for scheduler in (again.experts[0].scheduler, again.frame.scheduler):
        assert meaning(scheduler) == meaning(ensemble.experts[0].scheduler) == ("v_prediction", keys != "none")


def test_training_uses_the_target_and_the_noise_that_the_file_says(made, home):
    ensemble = Ensemble.from_experts([str(made("whole", "v and zero"))], config=str(home / "configs"), aggregator="mean")
    kind, signal, noise, _ = tables(ensemble.frame.scheduler)
    assert kind == "v_prediction" and float(signal[-1]) == 0 and float(noise[-1]) == 1


@pytest.mark.parametrize("maker", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_every_schedulers_way_to_zero_terminal_snr_samples_finite_latents_from_the_first_step_on(maker):
    usual = maker(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = predicting(usual, Prediction("v_prediction", True), "a test")
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        latents = scheduler.step(torch.randn(1, 4, 8, 8), time, latents).prev_sample
    assert int(scheduler.timesteps[0]) == 999 and latents.isfinite().all() and float(latents.abs().max()) < 50


def _mean():
    from afa.aggregators.registry import Recipe

    return Recipe("mean")
