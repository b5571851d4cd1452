"""Which stage a parameter belongs to, and block weights in every form they are written in."""

import re

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from family_models import MODELS
from merging_models import SMALL
from tiny import sd_unet, sdxl_unet
from tiny_transformers import flux_transformer, sd3_transformer

from afa.denoiser.base import EnsembleDenoiser
from afa.errors import UserError
from afa.merging.block_weights import PRESETS, preset_weights, stage_weights
from afa.merging.keys import key_stages
from afa.merging.memory import PartsMerge
from afa.merging.single_file import original_places
from afa.models.registry import FAMILIES, Family, family_of, stage_names, stages_of
from afa.stages.tokens import Block, Head
from afa.training.finetune import adapted

SD = (*(f"IN{k:02}" for k in range(12)), "M00", *(f"OUT{k:02}" for k in range(12)))
SDXL = (*(f"IN{k:02}" for k in range(9)), "M00", *(f"OUT{k:02}" for k in range(9)))
SMALL_FLUX = ("D00", "D01", "S00", "S01", "S02", "OUT")
EVERY = {**{name: model.make for name, model in MODELS.items()}, "sd": sd_unet, "sdxl": sdxl_unet, "small": lambda: sd_unet(**SMALL)}


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_belongs_to_the_stage_that_runs_it(name):
    model = EVERY[name]()
    found = stages_of(dict(model.named_parameters()), model)
    of = {id(parameter): found[name] for name, parameter in model.named_parameters()}
    walked = FAMILIES[family_of(model)].stages(model)
    for stage in walked:
        own = [of.pop(id(parameter)) for module in stage.modules() for parameter in module.parameters()]
        assert set(own) == {stage.name}
    assert set(of.values()) == {walked[0].name}  # only the embeddings are left, which every stage uses
    blocks = tuple(f"{stage.block}." for stage in walked if stage.block)
    assert not [name for name, parameter in model.named_parameters() if id(parameter) in of and name.startswith(blocks)]


def blocks_of(name: str) -> str:
    """The stage a published name of a transformer's parameter says it belongs to; none for what is before and after all blocks."""
    found = re.match(r"(single_)?transformer_blocks\.(\d+)\.", name)
    return "" if found is None else f"{'S' if found[1] else ''}{int(found[2]):02}"


@pytest.mark.parametrize(("make", "letter"), [(sd3_transformer, "J"), (flux_transformer, "D")], ids=["sd3", "flux"])
def test_a_transformers_blocks_are_its_stages_by_number(make, letter):
    model = make()
    found = stages_of(model.state_dict(), model)
    for name, stage in found.items():
        if block := blocks_of(name):
            assert stage == (block if block.startswith("S") else letter + block)
    ends = {name: stage for name, stage in found.items() if not blocks_of(name)}
    assert {stage for name, stage in ends.items() if name.startswith(("norm_out.", "proj_out."))} == {"OUT"}
    assert {stage for name, stage in ends.items() if not name.startswith(("norm_out.", "proj_out."))} == {f"{letter}00"}


@pytest.mark.parametrize(("unet", "expected"), [(sd_unet(), SD), (sdxl_unet(), SDXL)], ids=["sd", "sdxl"])
def test_the_original_layout_numbers_the_same_stages(unet, expected):
    """input_blocks.4 is IN04: that is where the community's names come from."""
    stages = key_stages([f"unet.{name}" for name in unet.state_dict()], unet)
    places = original_places("unet", {name: tensor.shape for name, tensor in unet.state_dict().items()}, unet)
    assert stage_names(unet) == expected
    for name, place in places.items():
        found = re.search(r"\.(input|output)_blocks\.(\d+)\.", place.key)
        middle = "M00" if ".middle_block." in place.key else expected[-1] if ".out." in place.key else "IN00"
        assert stages[f"unet.{name}"] == (f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}" if found else middle)


def test_the_ends_follow_the_rule_of_block_merging():
    found = stages_of(sdxl_unet().state_dict(), sdxl_unet())
    assert {found[f"{name}.weight"] for name in ("time_embedding.linear_1", "add_embedding.linear_2", "conv_in")} == {"IN00"}
    assert {found["conv_norm_out.weight"], found["conv_out.bias"]} == {"OUT08"}
    assert found["up_blocks.0.upsamplers.0.conv.weight"] == "OUT02"
    assert found["down_blocks.0.downsamplers.0.conv.weight"] == "IN03"


def test_what_a_file_holds_besides_belongs_to_the_stage_around_it():
    found = stages_of(["transformer_blocks.2.attn.to_q.scale_weight", "single_transformer_blocks.1.x"], flux_transformer(num_layers=3))
    assert list(found.values()) == ["D02", "S01"]


def test_everything_but_the_denoiser_is_base():
    found = key_stages(["transformer.proj_out.weight", "text_encoder_3.shared.weight", "vae.transformer_blocks.1.x"], sd3_transformer())
    assert list(found.values()) == ["OUT", "base", "base"]


def test_a_denoiser_of_no_known_family_is_refused():
    with torch.device("meta"):
        other = PixArtTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    with pytest.raises(ValueError, match="a PixArtTransformer2DModel cannot be an expert; supported are: UNet2DConditionModel"):
        stage_names(other)


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
def test_sdxl_gets_what_stages_of_the_same_name_get(preset):
    """As in supermerger, where IN09 … IN11 and OUT09 … OUT11 are left out."""
    full = preset_weights(preset, SD)
    assert preset_weights(preset, SDXL) == {stage: full[stage] for stage in SDXL}


def test_sdxl_has_19_stages_and_base():
    assert stage_weights([0.5] * 20, SDXL, 2) == {"base": (0.5, 0.5), **dict.fromkeys(SDXL, (0.5, 0.5))}
    assert stage_weights([0.0, *[1.0] * 19], SDXL, 2) == stage_weights([1.0] * 19, SDXL, 2)
    with pytest.raises(UserError, match=r"26 block weights, expected 19 \(IN00 … OUT08\) or 20 \(base in front of them\)"):
        stage_weights([0.5] * 26, SDXL, 2)


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
    ({"others": [1, 2]}, 3, "2 weights of base for 3 experts"),
    ({"others": [0, 0]}, 2, "weights 0 0 of base are no shares"),
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


@pytest.mark.parametrize("stages", [("J00", "J01", "OUT"), SMALL_FLUX], ids=["sd3", "flux"])
def test_presets_are_for_unets(stages):
    with pytest.raises(UserError, match="preset GRAD_V is for the stages of a U-Net"):
        stage_weights("GRAD_V", stages, 2)


def test_a_transformers_stages_are_weighted_by_name_and_in_order():
    weights = stage_weights({"others": 0.25, "S01": 1}, SMALL_FLUX, 2)
    assert weights == {"base": (0.75, 0.25), **dict.fromkeys(SMALL_FLUX, (0.75, 0.25)), "S01": (0, 1)}
    assert stage_weights("0,0,0,1,0,0", SMALL_FLUX, 2)["S01"] == (0, 1)
    with pytest.raises(UserError, match=r"5 block weights, expected 6 \(D00 … OUT\) or 7 \(base in front of them\)"):
        stage_weights("0,0,0,1,0", SMALL_FLUX, 2)


def test_a_further_family_needs_only_its_entry_in_the_table(monkeypatch):
    """Its blocks have the names of SD3's, and are stages of its own all the same: for merges, and for LoRAs."""

    def read(model):
        blocks = [Block(name=f"P{index:02}", channels=16, level=1, module=block) for index, block in enumerate(model.transformer_blocks)]
        return (*blocks, Head(name="OUT", channels=16, level=1, model=model))

    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "norm_num_groups": 4}
    first, second = (PixArtTransformer2DModel(**config, caption_channels=16, sample_size=8) for _ in range(2))
    class PixArtEnsemble(EnsembleDenoiser):
        family = "pixart"
        interface = FAMILIES["sd3"].interface
        read_stages = staticmethod(read)

    monkeypatch.setitem(FAMILIES, "pixart", Family("PixArtTransformer2DModel", "transformer", PixArtEnsemble))
    merge = PartsMerge([{"transformer": first}, {"transformer": second}], ["first", "second"])
    assert merge.stages == ("P00", "P01", "OUT")
    merge.apply("mbw", weights={"others": 0, "P01": 1})
    merged = merge.parts["transformer"].state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, (second if name.startswith("transformer_blocks.1.") else first).state_dict()[name]), name
    layers = {f"transformer_blocks.1.{part}" for part in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj")}
    assert layers <= {name for name, _ in adapted(first)}
    assert all(name.startswith("transformer_blocks.") for name, _ in adapted(first))
