"""Which stage a parameter belongs to, and block weights in every form they are written in."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from merging_models import FLUX, SD3, SMALL
from tiny import sd_unet, sdxl_unet

from afa.errors import UserError
from afa.families.unet import stages
from afa.merging.original import original_places
from afa.merging.presets import PRESETS, preset_weights
from afa.merging.stages import stage_names, stages_of
from afa.merging.weights import stage_weights

SD = (*(f"IN{k:02}" for k in range(12)), "M00", *(f"OUT{k:02}" for k in range(12)))
SDXL = (*(f"IN{k:02}" for k in range(9)), "M00", *(f"OUT{k:02}" for k in range(9)))


@pytest.mark.parametrize("unet", [sd_unet(), sdxl_unet(), sd_unet(**SMALL)], ids=["sd", "sdxl", "small"])
def test_every_parameter_belongs_to_the_stage_that_runs_it(unet):
    found = stages_of(dict(unet.named_parameters()))
    of = {id(parameter): found[name] for name, parameter in unet.named_parameters()}
    for stage in stages(unet):
        own = {of.pop(id(parameter)) for module in stage.modules() for parameter in module.parameters()}
        assert own <= {stage.name}
    assert set(of.values()) == {"IN00"}  # only the embeddings are left, which every stage uses
    assert all("embedding" in name for name, parameter in unet.named_parameters() if id(parameter) in of)


@pytest.mark.parametrize(("unet", "expected"), [(sd_unet(), SD), (sdxl_unet(), SDXL)], ids=["sd", "sdxl"])
def test_both_layouts_name_the_same_stages(unet, expected):
    names = list(unet.state_dict())
    places = original_places("unet", names)
    original = {name: places[name].key.removeprefix("model.diffusion_model.") for name in names}
    in_original = stages_of(original.values())
    assert stage_names(names) == stage_names(original.values()) == expected == tuple(stage.name for stage in stages(unet))
    assert all(stages_of(names)[name] == in_original[original[name]] for name in names)


def test_the_ends_follow_the_rule_of_block_merging():
    found = stages_of(sdxl_unet().state_dict())
    assert {found[f"{name}.weight"] for name in ("time_embedding.linear_1", "add_embedding.linear_2", "conv_in")} == {"IN00"}
    assert {found["conv_norm_out.weight"], found["conv_out.bias"]} == {"OUT08"}
    assert found["up_blocks.0.upsamplers.0.conv.weight"] == "OUT02"
    assert found["down_blocks.0.downsamplers.0.conv.weight"] == "IN03"


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [(SD3Transformer2DModel, SD3, ("block.0", "block.1")), (FluxTransformer2DModel, FLUX, ("block.0", "block.1", "single.0", "single.1"))],
    ids=["sd3", "flux"],
)
def test_a_transformers_blocks_are_its_stages(kind, config, expected):
    with torch.device("meta"):
        names = list(kind(**config).state_dict())
    found = stages_of(names)
    assert stage_names(names) == expected
    assert found["x_embedder.weight" if "x_embedder.weight" in found else "pos_embed.proj.weight"] == "block.0"
    assert found["proj_out.weight"] == found["norm_out.linear.weight"] == expected[-1]


def test_names_of_no_known_denoiser_are_refused():
    with pytest.raises(ValueError, match="'layers.0.weight' are those of no denoiser"):
        stages_of(["layers.0.weight"])


def test_a_share_is_the_seconds_and_base_is_the_firsts_unless_said():
    weights = stage_weights({"others": 0.25, "M00": 1}, SD, 2)
    assert weights["IN00"] == weights["base"] == (0.75, 0.25)
    assert weights["M00"] == (0, 1)
    assert stage_weights("FLAT_50", SD, 2)["base"] == (1, 0)
    assert stage_weights("FLAT_50", SD, 2, base_alpha=0.5)["base"] == (0.5, 0.5)


@pytest.mark.parametrize("given", [[0.5] * 25, [0.0] + [0.5] * 25, ",".join(["0.5"] * 25), dict.fromkeys(SD, 0.5), "FLAT_50"])
def test_all_forms_of_the_same_weights_are_the_same(given):
    assert stage_weights(given, SD, 2) == {"base": (1, 0), **dict.fromkeys(SD, (0.5, 0.5))}


def test_toml_names_stages(tmp_path):
    file = tmp_path / "weights.toml"
    file.write_text('others = [2, 1, 1]\nbase = [0, 0, 1]\nOUT11 = [1.0, 0, 0]\n')
    weights = stage_weights(str(file), SD, 3)
    assert weights["base"] == (0, 0, 1)
    assert weights["IN05"] == (0.5, 0.25, 0.25)
    assert weights["OUT11"] == (1, 0, 0)


def test_one_set_of_numbers_per_expert_is_convex_at_every_stage():
    weights = stage_weights(["GRAD_V", "GRAD_A", ",".join(["1"] * 26)], SD, 3)
    assert weights["IN00"] == (0.5, 0, 0.5)
    assert weights["M00"] == (0, 0.5, 0.5)
    assert weights["base"] == (0, 0, 1)
    assert all(sum(row) == pytest.approx(1) for row in weights.values())


def test_presets_are_those_of_the_community():
    """Published for 25 stages, IN00 … OUT11 (bbc-mc's preset.tsv)."""
    assert list(preset_weights("WRAP12", SD).values()) == [1] * 6 + [0] * 13 + [1] * 6
    assert list(preset_weights("MID12_50", SD).values()) == [0] * 5 + [0.5] * 14 + [0] * 6
    assert list(preset_weights("RING10_3", SD).values()) == [0] * 6 + [1] * 5 + [0] * 3 + [1] * 5 + [0] * 6
    assert list(preset_weights("GRAD_V", SD).values())[:3] == pytest.approx([1, 0.9166666667, 0.8333333333])
    assert list(preset_weights("SMOOTHSTEP", SD).values())[1:3] == pytest.approx([0.00506365740740741, 0.0196759259259259])
    assert {f"FLAT_{k}" for k in (25, 50, 75)} | {f"WRAP{k}" for k in ("08", "12", "14", "16")} | {"GRAD_A", "MID12_50"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_their_ends_and_middle_on_any_number_of_stages(preset):
    full, small = preset_weights(preset, SD), preset_weights(preset, ("IN00", "IN01", "M00", "OUT00", "OUT01"))
    assert [small[stage] for stage in ("IN00", "M00", "OUT01")] == [full[stage] for stage in ("IN00", "M00", "OUT11")]
    assert all(0 <= share <= 1 for share in preset_weights(preset, SDXL).values())


REFUSALS = [
    ([0.5] * 24, 2, "24 block weights, expected 25 (IN00 … OUT11) or 26 (base in front of them)"),
    ({"IN00": 0.5}, 2, "there is no weight for IN01"),
    ({"others": 0.5, "OUT12": 1}, 2, "there is no stage 'OUT12'; did you mean"),
    ({"others": 1.5}, 2, "base = 1.5 is no share of the second expert"),
    ({"others": 0.5}, 3, "base = 0.5 is a share of the second of two experts; for 3"),
    ({"others": [1, 2]}, 3, "base has 2 weights (1 2) for 3 experts"),
    ({"others": [0, 0]}, 2, "the weights 0 0 of base are no shares"),
    ("GRAD_W", 2, "'GRAD_W' are no block weights"),
    ("none.toml", 2, "none.toml cannot be read as a TOML file"),
    (["GRAD_V", "GRAD_A"], 3, "2 sets of block weights for 3 experts"),
]


@pytest.mark.parametrize(("given", "experts", "sentence"), REFUSALS)
def test_weights_that_make_no_sense_are_refused_in_one_sentence(given, experts, sentence):
    with pytest.raises(UserError) as refusal:
        stage_weights(given, SD, experts)
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_base_is_said_only_once():
    with pytest.raises(UserError, match="name base"):
        stage_weights({"others": 0.5}, SD, 2, base_alpha=0.5)
    with pytest.raises(UserError, match="base_alpha 2 is the share"):
        stage_weights("FLAT_50", SD, 2, base_alpha=2)


@pytest.mark.parametrize("text", ["IN00 = true", 'IN00 = "a"', "[IN00]\nx = 1", "IN00 = []", "IN00 ="])
def test_a_toml_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "weights.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"weights\.toml"):
        stage_weights(str(file), SD, 2)


def test_presets_are_for_unets():
    with pytest.raises(UserError, match="preset GRAD_V is for the stages of a U-Net"):
        stage_weights("GRAD_V", ("block.0", "block.1"), 2)
