"""`afa inspect`: what an ensemble is, whether it can be, and what it will cost."""

import contextlib
import json
import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from family_models import MODELS
from inspected import edit, pipe, write_experts
from tiny import inputs, scheduler, sd_unet, sdxl_inputs, sdxl_unet
from tiny_chroma import CHROMA_SMALL
from tiny_flux2 import FLUX2_SMALL
from tiny_krea2 import KREA2_SMALL
from tiny_lumina2 import LUMINA2_SMALL
from tiny_qwen_image_21 import QWEN_IMAGE_21_SMALL
from tiny_transformers import FLUX_SMALL, QWEN_IMAGE_SMALL
from tiny_z_image import Z_IMAGE_SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.cli import main as command_line
from afa.cli.inspect import Options, run
from afa.cost import call_of, count_flops, count_training_flops
from afa.experts.compatible import mismatches
from afa.experts.description import describe_config, describe_expert
from afa.experts.expert import Expert
from afa.experts.spec import ExpertSpec
from afa.pages.numbers import scaled
from afa.pages.tables import listing

SMALL = {"hidden": 32, "heads": 2, "depth": 1}
FEW = {  # two blocks of a kind, of which one is counted for both
    "flux": FLUX_SMALL,
    "flux2": FLUX2_SMALL,
    "qwen-image": QWEN_IMAGE_SMALL,
    "z-image": Z_IMAGE_SMALL,
    "chroma": CHROMA_SMALL,
    "qwen-image-2.1": QWEN_IMAGE_21_SMALL,
    "krea2": KREA2_SMALL,
    "lumina2": LUMINA2_SMALL,
}
ONLY_INSPECT = "import sys, afa.cli.main as m; m.COMMANDS = {'inspect': 'afa.cli.inspect'}; "


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("inspected"))


@pytest.fixture
def inspect(capsys):
    """Run the command and parse its JSON."""

    def run_json(*sources, **options):
        run(Options(experts=[str(source) for source in sources], json=True, **options))
        return json.loads(capsys.readouterr().out)

    return run_json


@pytest.fixture
def look(inspect):
    """The same with aggregators that cost nothing, where they do not matter."""
    return lambda *sources, **options: inspect(*sources, aggregator="mean", **options)


@pytest.fixture
def afa(monkeypatch, capsys):
    """The command line: -> exit code, stdout, stderr."""
    monkeypatch.setattr(command_line, "COMMANDS", {"inspect": "afa.cli.inspect"})

    def call(*arguments):
        code = command_line.main(["inspect", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return call


def meta(model):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(model.config)


def count(module):
    return sum(tensor.numel() for tensor in module.parameters())


class TestCounts:
    def test_sd15_has_the_published_sizes(self, inspect):
        found = inspect(config="sd15", aggregator="sabw", hidden=128, heads=8, depth=2)
        assert [expert["parameters"] for expert in found["experts"]] == [859_520_964] * 3
        assert len(found["stages"]) == 25
        assert sum(stage["aggregator_parameters"] for stage in found["stages"]) == 45_132_416
        assert found["aggregators"]["parameters"] == 45_132_416
        assert found["cost"]["resolution"] == [512, 512]
        assert found["cost"]["bytes"]["float16"]["experts"] == 2 * 3 * 859_520_964

    def test_sdxl_has_the_published_sizes(self, look):
        found = look(config="sdxl", count=1)
        assert found["cost"]["parameters"]["experts"] == found["experts"][0]["parameters"] == 2_567_463_684
        assert [text["width"] for text in found["experts"][0]["text_encoders"]] == [768, 1280]
        assert len(found["stages"]) == 19
        assert found["cost"]["resolution"] == [1024, 1024]

    def test_an_ensemble_is_described_as_it_loads(self, inspect, experts):
        found = inspect(experts / "photo", experts / "sketch", aggregator="sabw", **SMALL)
        ensemble = Ensemble.from_experts([str(experts / "photo"), str(experts / "sketch")], aggregator="sabw", **SMALL)
        held, stock = found["cost"]["parameters"], ensemble.pipeline()
        assert held["experts"] == count(ensemble.denoiser.experts)
        assert held["aggregators"] == count(ensemble.aggregators)
        assert (held["text_encoders"], held["vae"]) == (count(stock.text_encoder), count(stock.vae))
        assert held["total"] == sum(value for name, value in held.items() if name != "total")
        assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in ensemble.denoiser.stages]
        assert found["cost"]["resolution"] == [stock.vae_scale_factor * 16] * 2

    def test_a_single_file_is_described_as_its_folder(self, look, experts):
        single, folder = look(experts / "photo.safetensors", config=str(experts / "configs")), look(experts / "photo")
        assert single["stages"] == folder["stages"]
        assert single["cost"] == folder["cost"]

    @pytest.mark.parametrize(("placement", "fused"), [("layers", 9), ("blocks", 5), ("out", 1), ("M00,OUT03", 2)])
    def test_only_placed_stages_have_aggregators(self, inspect, experts, placement, fused):
        found = inspect(experts / "photo", experts / "paint", placement=placement, **SMALL)
        assert sum(stage["fused"] for stage in found["stages"]) == found["aggregators"]["fused"] == fused
        assert all((stage["aggregator_parameters"] is not None) == stage["fused"] for stage in found["stages"])


class TestCost:
    def test_one_expert_under_three_names_is_computed_three_times_and_held_once(self, look, experts):
        places = [f"{name}={experts / 'photo'}" for name in "abc"]
        one, three = look(places[0])["cost"], look(*places)["cost"]
        assert three["flops"]["ensemble"] == three["flops"]["experts"] == 3 * one["flops"]["experts"] > 0
        assert three["parameters"]["experts"] == one["parameters"]["experts"]
        loaded = Ensemble.from_experts(places, aggregator="mean").denoiser
        assert count(loaded.experts) == one["parameters"]["experts"]  # as it is when it is loaded

    def test_an_ensemble_costs_its_experts_and_its_aggregators(self, inspect, experts):
        found = inspect(experts / "photo", experts / "paint", **SMALL)
        flops = found["cost"]["flops"]
        assert flops["ensemble"] == flops["experts"] + flops["aggregators"]
        assert flops["aggregators"] == sum(stage["aggregator_flops"] for stage in found["stages"]) > 0

    @pytest.mark.parametrize(("make", "call"), [(sd_unet, inputs), (sdxl_unet, sdxl_inputs)])
    def test_flops_are_those_of_a_real_pass(self, make, call):
        unet = make(0)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            unet(**call(batch=1, height=16, width=24))
        assert count_flops(meta(unet), 16, 24, batch=1, tokens=7).total == counter.get_total_flops()

    @pytest.mark.parametrize(("name", "kind"), [(name, ("sabw", "stitch")[place % 2]) for place, name in enumerate(MODELS)])
    def test_one_count_says_what_every_placement_and_expert_costs_and_stages_of_one_kind_that_run_once_count_as_if_each_ran(self, name, kind, monkeypatch):
        """Aggregators see maps alone, so that each kind of them is tried with half of the families."""
        ensemble = MODELS[name].ensemble
        with torch.device("meta"):
            made = MODELS[name].make(**FEW.get(name, {}))
            experts = [type(made).from_config(made.config) for _ in range(2)]
            whole, some = (ensemble(experts, recipe=Recipe(kind, SMALL), placement=where) for where in ("layers", "every-2"))
        counted = count_flops(whole, 24, 16, tokens=7)
        assert counted.only(some.fused) == count_flops(some, 24, 16, tokens=7)
        assert counted.only([]).total == 2 * count_flops(experts[0], 24, 16, tokens=7).total
        monkeypatch.setattr("afa.cost._each_kind_once", lambda *_: contextlib.nullcontext({"": 0}))
        assert counted == count_flops(whole, 24, 16, tokens=7)

    @pytest.mark.parametrize("name", ["sd", "flux"])
    def test_flops_of_training_are_those_of_a_real_step(self, name):
        model = MODELS[name]
        expert, options = model.make(), {"recipe": Recipe("sabw", SMALL), "placement": model.chosen}
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            made = model.ensemble([expert], **options)
            made(**call_of(made, 16, 24, 1, 7)).sample.sum().backward()
        with torch.device("meta"):
            outline = model.ensemble([type(expert).from_config(expert.config)], **options)
        assert count_training_flops(outline, 16, 24, batch=1, tokens=7) == counter.get_total_flops()

    def test_two_images_cost_twice_one(self, inspect, experts):
        places = experts / "photo", experts / "paint"
        one, two = (inspect(*places, batch_size=batch, **SMALL)["cost"]["flops"] for batch in (1, 2))
        assert two["ensemble"] == 2 * one["ensemble"]

    def test_larger_images_cost_more_and_hold_the_same(self, look, experts):
        small, large = (look(experts / "photo", resolution=side)["cost"] for side in (128, 256))
        assert large["flops"]["experts"] > 4 * small["flops"]["experts"]
        assert large["bytes"] == small["bytes"]

    def test_equal_text_encoders_are_held_once(self, look, experts):
        shared, own = (look(experts / "photo", experts / name)["cost"]["parameters"] for name in ("paint", "sketch"))
        assert 0 < 2 * shared["text_encoders"] == own["text_encoders"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give EXPERT"),
            ({"experts": ["a"], "count": 3}, "--count 3 is for --config without EXPERT"),
            ({"config": "sd15", "batch_size": 0}, "--batch-size 0 is too small"),
            ({"config": "sd15", "hidden": 100, "heads": 8}, "hidden 100 is not a multiple of heads 8"),
            ({"config": "sd15", "aggregator": "sawb"}, "did you mean 'sabw'"),
            ({"config": "sd15", "aggregator": "mean", "hidden": 8}, "--hidden 8 is no option of --aggregator mean; it has no options"),
            ({"config": "sd15", "placement": "IN04"}, "add OUT11"),
            ({"config": "sd15", "resolution": 130}, "--resolution 130 is not a multiple of 8.*try 128"),
            ({"config": "sd14"}, "there is no config .* 'sd14'; did you mean"),
        ],
    )
    def test_what_makes_no_sense(self, options, message):
        with pytest.raises(UserError, match=message):
            run(Options(**options))

    def test_two_experts_of_one_name(self, experts):
        with pytest.raises(UserError, match="two experts are called 'photo'"):
            run(Options(experts=[str(experts / "photo"), f"photo={experts / 'paint'}"]))


class TestFusion:
    def test_every_mismatch_is_named_after_the_report(self, afa, experts, tmp_path):
        pipe(3, prediction_type="v_prediction", block_out_channels=(16, 24), cross_attention_dim=32).save_pretrained(
            tmp_path / "odd"
        )
        code, out, err = afa(experts / "photo", experts / "paint", tmp_path / "odd", "--json")
        found = json.loads(out)
        expected = [
            "stage IN03 has 24 channels, expected 32 (and so M00, OUT00, OUT01)",
            "cross_attention_dim is 32, expected 24",
            "prediction_type is v_prediction, expected epsilon (may differ where only predictions are combined: placement out)",
        ]
        assert code == 2
        assert found["mismatches"] == [f"'odd' cannot join 'photo': {reason}" for reason in expected]
        assert all(reason in err for reason in found["mismatches"])
        assert found["aggregators"] is found["cost"]["flops"]["ensemble"] is None
        assert len(found["cost"]["flops"]["each_expert"]) == 3

    def test_blocks_that_are_cut_differently(self):
        one, other = Expert(name="a", model=meta(sd_unet(0))), Expert(name="b", model=meta(sdxl_unet(0)))
        stages = "stages IN09, IN10, IN11, OUT09, OUT10, OUT11 are"
        counts = "it has 19 stages, expected 25; the blocks are cut differently"
        assert mismatches([one, other])[0] == f"'b' cannot join 'a': {stages} missing; {counts}"
        assert mismatches([other, one])[0].startswith(f"'a' cannot join 'b': {stages} not expected; it has 25")
        assert any("addition_embed_type is text_time, expected None" in reason for reason in mismatches([one, other]))

    def test_text_encoders_of_other_widths(self, experts):
        photo, real = describe_expert(ExpertSpec.parse(str(experts / "photo"))).expert, describe_config("real", "sd15").expert
        other = Expert(name="b", model=photo.model, text_encoders=real.text_encoders, scheduler=scheduler())
        assert mismatches([photo, other]) == ["'b' cannot join 'photo': text encoder 1 is 768 wide, expected 24"]


class TestSavedEnsembles:
    @pytest.fixture
    def saved(self, experts, tmp_path):
        places = [str(experts / "photo"), str(experts / "paint")]
        Ensemble.from_experts(places, placement="blocks", vae="paint", **SMALL).save(tmp_path / "mine")
        return tmp_path / "mine"

    def test_one_is_shown_as_it_was_made(self, inspect, saved, experts):
        found, again = inspect(saved), inspect(experts / "photo", experts / "paint", placement="blocks", aggregator="sabw", **SMALL)
        assert found["ensemble"] == str(saved)
        assert found["stages"] == again["stages"]
        assert found["cost"] == again["cost"]
        assert found["aggregators"]["options"] == {**SMALL, "dropout": 0.0}

    def test_aggregators_that_are_cut_off(self, saved):
        file = saved / "aggregators.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(UserError, match="aggregators.safetensors is cut off"):
            run(Options(experts=[str(saved)]))

    def test_aggregators_that_lack_a_weight(self, saved):
        edit(saved / "aggregators.safetensors", lambda tensors: tensors.pop("M00.conv_out.weight"))
        with pytest.raises(UserError, match=r"lacks 1 of .*M00.conv_out.weight"):
            run(Options(experts=[str(saved)]))

    def test_an_expert_that_is_gone(self, saved):
        manifest = saved / "afa.json"
        manifest.write_text(manifest.read_text().replace('/paint"', '/gone/painting"'))  # nothing beside that place can be it
        with pytest.raises(UserError, match="expert 'paint' was at .*painting, which is not there"):
            run(Options(experts=[str(saved)]))

    def test_one_brings_its_own_settings(self, saved, experts):
        with pytest.raises(UserError, match="leave out --hidden"):
            run(Options(experts=[str(saved)], hidden=8))
        with pytest.raises(UserError, match="inspect it alone"):
            run(Options(experts=[str(saved), str(experts / "photo")]))


class TestOutput:
    def test_text_and_json_hold_the_same_numbers(self, afa, experts):
        words = [experts / "photo", experts / "sketch", "--depth", 0]
        (_, text, _), (_, document, _) = afa(*words), afa(*words, "--json")
        found, lines = json.loads(document), {line.split()[0]: line for line in text.splitlines() if line.strip()}
        for stage in found["stages"]:
            assert f" {stage['channels']} " in lines[stage["name"]]
            assert f" {stage['aggregator_parameters']:,} " in lines[stage["name"]]
        assert all(f" {value:,} " in text for value in found["cost"]["parameters"].values())
        assert all(scaled(value, "B") in text for sizes in found["cost"]["bytes"].values() for value in sizes.values())
        assert all(scaled(found["cost"]["flops"][part], "FLOP") in text for part in ("experts", "aggregators", "ensemble"))

    def test_experts_may_stand_before_or_after_options(self, afa, experts):
        places, options = [experts / "photo", experts / "paint"], ["--aggregator", "mean", "--json"]
        assert afa(*options, *places) == afa(*places, *options)



def test_columns_stand_under_their_headers():
    assert listing(["name", ">size"], [["a", 1], ["long name", None]]) == "name       size\na             1\nlong name     -"


SCALED = [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (859_520_964 * 4, "3.438 GB"), (999_960, "1 MB"), (None, None)]


@pytest.mark.parametrize(("value", "text"), SCALED)
def test_numbers_carry_the_unit_that_fits(value, text):
    assert scaled(value, "B") == text


class TestTime:
    def test_a_step_is_measured_when_it_is_asked_for(self, look, inspect, experts):
        assert look(experts / "photo", experts / "paint")["cost"]["time"] is None
        for kind in ("mean", "stitch"):
            found = inspect(experts / "photo", experts / "paint", aggregator=kind, time=True, device="cpu")["cost"]["time"]
            least, middle, most = found["ratios"]
            assert 0 < least <= middle <= most and found["rounds"] == 3
            assert found["ensemble"] > found["one_expert"] > 0 and (found["device"], found["dtype"]) == ("cpu", "float32")

    def test_a_model_that_does_not_fit_into_memory_is_refused(self, afa, monkeypatch):
        monkeypatch.setattr("afa.cost.free_bytes", lambda device: 10**9)
        code, _, error = afa("--config", "sd15", "--aggregator", "mean", "--time", "--device", "cpu")
        assert code == 2 and "one expert takes 3.4 GB, and 1.0 GB are free; leave out --time" in error

    def test_a_device_without_time_is_refused(self, afa, experts):
        code, _, error = afa(experts / "photo", experts / "paint", "--device", "cpu")
        assert code == 2 and "--device cpu is for --time" in error
