"""Merges in memory: of pipelines and experts of every family, and many merges written into one model."""

import pytest
import torch
from merging_models import PIPELINES, SMALL, apart, flux, sd, sd3, sdxl, weights_of
from tiny import quiet, sd_unet

import afa
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.load import load_experts
from afa.merging.memory import InMemoryMerge, merge_experts, merge_pipelines
from afa.merging.rules import weighted


def experts(count: int = 3, family: str = "sd"):
    return load_experts([PIPELINES[family](seed) for seed in range(count)])


def state(expert) -> dict[str, torch.Tensor]:
    """A copy of an expert's weights."""
    models = {"model": expert.model, **{f"text{place}": encoder for place, encoder in enumerate(expert.text_encoders)}}
    return {f"{part}.{name}": tensor.clone() for part, model in models.items() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_merged_pipeline_is_new_and_the_others_stay_as_they_were(family):
    pipes = [PIPELINES[family](seed) for seed in range(2)]
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


CHANGED = {  # stage -> the modules it runs, written out
    "sd": ("OUT01", ("unet.up_blocks.0.resnets.1", "unet.up_blocks.0.attentions.1", "unet.up_blocks.0.upsamplers")),
    "sdxl": ("OUT08", ("unet.up_blocks.2.resnets.2", "unet.conv_out")),
    "sd3": ("J02", ("transformer.transformer_blocks.2.",)),
    "flux": ("S01", ("transformer.single_transformer_blocks.1.",)),
}


@pytest.mark.parametrize("family", PIPELINES)
def test_block_weights_change_their_stage_and_nothing_else(family):
    first, second = (PIPELINES[family](seed) for seed in range(2))
    stage, modules = CHANGED[family]
    before, then, other = (weights_of(pipe) for pipe in (first, merge_pipelines([first, second], "mbw", weights={"others": 0, stage: 1}), second))
    changed = {key for key, tensor in then.items() if not torch.equal(tensor, before[key])}
    assert {module for module in modules for key in changed if key.startswith(module)} == set(modules)
    assert all(key.startswith(modules) for key in changed)
    assert all(torch.equal(then[key], other[key]) for key in changed)


@pytest.mark.parametrize(("family", "stage"), [("sd", "M00"), ("sd3", "OUT"), ("flux", "D01")])
def test_many_merges_into_one_model_equal_new_ones(family, stage):
    """Whatever was written before, and though stages with unchanged weights are not written again."""
    *others, base = experts(3, family)
    merge = InMemoryMerge(others, base)
    one_stage = {"others": 0.25, stage: 1}
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
    expert = merge.apply("mbw", weights={"others": 0.5})
    touched = expert.model.conv_in.weight
    with torch.no_grad():
        touched.zero_()  # IN00: should it be written again, this would be gone
    merge.apply("mbw", weights={"others": 0.5, "OUT03": 1})
    assert not touched.any()
    merge.apply("mbw", weights={"others": 0.5, "IN00": 0.4})
    assert touched.any()


def test_an_interrupted_write_leaves_nothing_taken_for_written():
    merge = InMemoryMerge(experts(2))
    merge.apply("mbw", weights={"others": 0.5})
    good = state(merge.expert)
    with pytest.raises(UserError):
        merge.apply("mbw", weights={"others": [1, 1, 1]})
    assert equal(state(merge.apply("mbw", weights={"others": 0.5})), good)


def test_stages_are_those_of_the_experts():
    assert InMemoryMerge(experts(2)).stages == ("IN00", "IN01", "IN02", "IN03", "M00", "OUT00", "OUT01", "OUT02", "OUT03")
    assert InMemoryMerge(experts(2, "sd3")).stages == ("J00", "J01", "J02", "J03", "OUT")
    assert InMemoryMerge(experts(2, "flux")).stages == ("D00", "D01", "S00", "S01", "S02", "OUT")


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
    for family, make in PIPELINES.items():
        pipe = make(0)
        for method in ("weighted", "slerp"):
            assert apart(merge_pipelines([pipe, make(0)], method), pipe) == 0, (family, method)


def test_pipelines_that_do_not_fit_are_refused_in_one_sentence():
    for other, sentence in [
        (sd(1, block_out_channels=(16, 64)), "'pipeline 1' cannot join 'pipeline 0': stage"),
        (sdxl(1), "'pipeline 1' cannot join 'pipeline 0': it has unet, text_encoder, text_encoder_2, expected unet, text_encoder"),
        (flux(1), "'pipeline 1' cannot join 'pipeline 0': it has transformer"),
    ]:
        with pytest.raises(UserError) as refusal:
            merge_pipelines([sd(0), other])
        assert str(refusal.value).startswith(sentence)
    with pytest.raises(UserError, match="weighted takes no base"):
        merge_pipelines([sd(0), sd(1)], base=sd(2))
    with pytest.raises(UserError, match="there is no option 'weight'; did you mean 'weights'"):
        merge_pipelines([sd(0), sd(1)], weight=[1, 2])


def test_transformers_of_other_shapes_are_refused_naming_key_and_shapes():
    other = sd3(1)
    other.transformer.x_embedder = torch.nn.Linear(16, 8)
    with pytest.raises(UserError, match=r"'pipeline 1' cannot join 'pipeline 0': it has, besides what is expected, transformer\.x_embedder"):
        merge_pipelines([sd3(0), other])
    with pytest.raises(UserError, match=r"transformer\.pos_embed\.pos_embed has shape \(1, 64, 32\), expected \(1, 256, 32\)"):
        merge_pipelines([sd3(0), sd3(1, pos_embed_max_size=8)])


@pytest.mark.parametrize(
    ("make", "other", "sentence"),
    [
        (sd3, lambda: sd3(1, num_layers=3), "stages J03 are missing; it has 4 stages, expected 5"),
        (flux, lambda: flux(1, num_single_layers=4), "stages S03 are not expected; it has 7 stages"),
        (flux, lambda: flux(1, guidance_embeds=False), "guidance_embed"),
        (flux, lambda: sd3(1), "it has transformer, text_encoder, text_encoder_2, text_encoder_3, expected"),
    ],
    ids=["fewer blocks", "more single blocks", "schnell", "another family"],
)
def test_transformers_that_do_not_fit_are_refused_as_experts_are(make, other, sentence):
    with pytest.raises(UserError) as refusal:
        merge_pipelines([make(0), other()])
    assert str(refusal.value).startswith("'pipeline 1' cannot join 'pipeline 0': ")
    assert sentence in str(refusal.value)


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        absent = sd_unet(0, **SMALL)
    with pytest.raises(UserError, match=r"unet\.\S+ is not in memory"):
        merge_experts(load_experts([absent, sd_unet(1, **SMALL)]))
