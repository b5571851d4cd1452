"""Merges in memory: of pipelines and experts of every family, and many merges written into one model."""

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from merging_models import SMALL, afa_merge, apart, flux_pipeline, saved, sd, sd3_pipeline, sdxl, weights_of
from tiny import quiet, sd_unet

import afa
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.load import load_experts
from afa.merging.memory import InMemoryMerge, merge_experts, merge_pipelines
from afa.merging.rules import weighted

FAMILIES = {"sd": sd, "sdxl": sdxl, "sd3": sd3_pipeline, "flux": flux_pipeline}
CLASSES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}


def experts(count: int = 3):
    return load_experts([sd(seed) for seed in range(count)])


def state(expert) -> dict[str, torch.Tensor]:
    """A copy of an expert's weights."""
    models = {"unet": expert.model, **{f"text{place}": encoder for place, encoder in enumerate(expert.text_encoders)}}
    return {f"{part}.{name}": tensor.clone() for part, model in models.items() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_pipeline_is_new_and_the_others_stay_as_they_were(family):
    pipes = [FAMILIES[family](seed) for seed in range(2)]
    before = [{key: tensor.clone() for key, tensor in weights_of(pipe).items()} for pipe in pipes]
    merged = afa.merge_pipelines(pipes, "weighted", weights=[1, 3])
    assert type(merged) is type(pipes[0])
    assert all(equal(weights_of(pipe), then) for pipe, then in zip(pipes, before, strict=True))
    own = {tensor.data_ptr() for tensor in weights_of(merged).values()}
    assert not own & {tensor.data_ptr() for pipe in pipes for tensor in weights_of(pipe).values()}
    for key, tensor in weights_of(merged).items():
        first, second = (then[key] for then in before)
        expected = first if key.startswith("vae.") or not first.is_floating_point() else weighted([first, second], weights=(1, 3))
        assert torch.equal(tensor, expected), key


def test_a_merged_pipeline_makes_pictures():
    merged = quiet(merge_pipelines([sd(0), sd(1)], "slerp", t=0.3))
    assert merged("a tree", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_merged_from_files_too_and_frozen_text_encoders_are_read_once(family, tmp_path, capsys):
    pipes = [FAMILIES[family](seed) for seed in range(2)]
    folders = [saved(pipe, tmp_path / f"expert{seed}") for seed, pipe in enumerate(pipes)]
    weights = ["--method", "mbw", "--weights", ",".join(["0.25"] * (2 if family == "sd3" else 4))]
    assert afa_merge("--experts", *folders, *weights, "--output", tmp_path / "merged") == 0
    assert "Equal in all experts: text_encoder, text_encoder_2." in capsys.readouterr().out
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    read = CLASSES[family].from_pretrained(tmp_path / "merged", local_files_only=True, **without_t5)
    merged = merge_pipelines(pipes, "weighted", weights=(0.75, 0.25))
    assert apart(read, merged) == 0
    assert apart(merged, pipes[0], "transformer.") > 0.01
    assert afa_merge("--experts", *folders, "--output", tmp_path / "merged.safetensors") == 2
    assert "'expert0' has a transformer, and a single file in original layout is of a whole SD 1.x, 2.x or XL" in capsys.readouterr().err


def test_block_weights_change_their_stage_and_nothing_else():
    first, second = sd(0), sd(1)
    merged = merge_pipelines([first, second], "mbw", weights={"others": 0, "OUT01": 1})
    changed = {key for key, tensor in weights_of(merged).items() if not torch.equal(tensor, weights_of(first)[key])}
    layer = ("unet.up_blocks.0.resnets.1", "unet.up_blocks.0.attentions.1", "unet.up_blocks.0.upsamplers")
    assert changed
    assert all(key.startswith(layer) for key in changed)
    assert all(torch.equal(weights_of(merged)[key], weights_of(second)[key]) for key in changed)


def test_many_merges_into_one_model_equal_new_ones():
    """Whatever was written before, and though stages with unchanged weights are not written again."""
    *others, base = experts(3)
    merge = InMemoryMerge(others, base)
    one_stage = {"others": 0.25, "M00": 1}
    for method, options in [
        ("mbw", {"weights": {"others": 0.25}}),
        ("mbw", {"weights": one_stage}),
        ("task_arithmetic", {"scale": 0.7}),
        ("mbw", {"weights": one_stage}),
        ("ties", {}),
        ("weighted", {}),
        ("mbw", {"weights": {"others": 0.25, "base": 1}}),
    ]:
        based = base if method in ("task_arithmetic", "ties") else None
        assert equal(state(merge.apply(method, **options)), state(merge_experts(others, method, base=based, **options))), method


def test_only_stages_whose_weights_changed_are_written():
    merge = InMemoryMerge(experts(2))
    expert = merge.apply_mbw({"others": 0.5})
    touched = expert.model.conv_in.weight
    with torch.no_grad():
        touched.zero_()  # IN00: should it be written again, this would be gone
    merge.apply_mbw({"others": 0.5, "OUT03": 1})
    assert not touched.any()
    merge.apply_mbw({"others": 0.5, "IN00": 0.4})
    assert touched.any()


def test_an_interrupted_write_leaves_nothing_taken_for_written():
    merge = InMemoryMerge(experts(2))
    merge.apply_mbw({"others": 0.5})
    good = state(merge.expert)
    with pytest.raises(UserError):
        merge.apply_mbw({"others": [1, 1, 1]})
    assert equal(state(merge.apply_mbw({"others": 0.5})), good)


def test_stages_are_those_of_the_experts():
    assert InMemoryMerge(experts(2)).stages == ("IN00", "IN01", "IN02", "IN03", "M00", "OUT00", "OUT01", "OUT02", "OUT03")


def test_a_merged_expert_can_join_an_ensemble():
    pair = experts(2)
    merged = merge_experts(pair, "weighted")
    ensemble = Ensemble.from_experts([merged.model, sd_unet(5, **SMALL)], "mean")
    assert len(ensemble.experts) == 2
    assert merged.family == "unet"
    assert merged.vae is pair[0].vae
    assert merged.located is None
    assert merged.tokenizers == pair[0].tokenizers


def test_the_vae_is_the_firsts_anothers_or_merged():
    pair = experts(2)
    assert merge_experts(pair, vae=pair[1].name).vae is pair[1].vae
    merged = merge_experts(pair, merge_vae=True).vae
    assert torch.equal(merged.decoder.conv_in.weight, weighted([expert.vae.decoder.conv_in.weight for expert in pair]))
    with pytest.raises(UserError, match="vae='nobody' is no expert's name"):
        merge_experts(pair, vae="nobody")


def test_equal_experts_merge_to_themselves_in_every_family():
    for family, make in FAMILIES.items():
        pipe = make(0)
        for method in ("weighted", "slerp"):
            assert apart(merge_pipelines([pipe, make(0)], method), pipe) == 0, (family, method)


def test_pipelines_that_do_not_fit_are_refused_in_one_sentence():
    for other, sentence in [
        (sd(1, block_out_channels=(16, 64)), "'pipeline 1' cannot join 'pipeline 0': stage"),
        (sdxl(1), "'pipeline 1' cannot join 'pipeline 0': it has unet, text_encoder, text_encoder_2, expected unet, text_encoder"),
        (flux_pipeline(1), "'pipeline 1' cannot join 'pipeline 0': it has transformer"),
    ]:
        with pytest.raises(UserError) as refusal:
            merge_pipelines([sd(0), other])
        assert str(refusal.value).startswith(sentence)
    with pytest.raises(UserError, match="weighted takes no base"):
        merge_pipelines([sd(0), sd(1)], base=sd(2))
    with pytest.raises(UserError, match="there is no option 'weight'; did you mean 'weights'"):
        merge_pipelines([sd(0), sd(1)], weight=[1, 2])


def test_transformers_of_other_shapes_are_refused_naming_key_and_shapes():
    other = sd3_pipeline(1)
    other.transformer.proj_out = torch.nn.Linear(16, 8)
    with pytest.raises(UserError, match=r"transformer\.proj_out\.weight has shape \(8, 16\), expected \(4, 16\)"):
        merge_pipelines([sd3_pipeline(0), other])
    other.transformer.proj_out = torch.nn.Identity()
    with pytest.raises(UserError, match=r"it lacks transformer\.proj_out"):
        merge_pipelines([sd3_pipeline(0), other])


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        absent = sd_unet(0, **SMALL)
    with pytest.raises(UserError, match=r"unet\.\S+ is not in memory"):
        merge_experts(load_experts([absent, sd_unet(1, **SMALL)]))
