"""LoRAs loaded into a running ensemble: into all experts or some, as strong as asked for, and out again without a trace."""

import inspect

import pytest
import torch
from test_lora_sharing import ALIKE, close, fused_latents, once
from tiny_loras import FAMILIES, write_kohya, write_lora

from afa import Ensemble, UserError, only_expert
from afa.denoiser.lora import unique_bytes
from afa.experts.quantised import store_weights

WITHOUT_TEXT = ("sd3",)  # a LoRA on text encoders there goes into all experts


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def files(name, tmp_path_factory):
    root = tmp_path_factory.mktemp(name)
    FAMILIES[name].pipeline(0, text_seed=0).save_pretrained(root / "base")
    write_lora(name, root / "ink.safetensors", seed=1)
    write_lora(name, root / "oil.safetensors", seed=2, text=True)
    return root


@pytest.fixture
def ensemble(files):
    """Two experts that share everything, and one with a LoRA of its own."""
    base = files / "base"
    return Ensemble.from_experts([f"one={base}", f"two={base}", f"own={base}+{files / 'ink.safetensors'}*0.6"], aggregator="mean")


def drawn(ensemble, pipe, expert, **changes):
    with only_expert(ensemble.denoiser, expert):
        return once(pipe, **changes)


def same(ensemble, pipe, name, loras):
    """Whether each expert draws what a stock pipeline with these LoRAs in its weights draws."""
    return all(close(drawn(ensemble, pipe, expert), fused_latents(name, *own)) for expert, own in loras.items())


def held(ensemble):
    return [*ensemble.denoiser.named_parameters(), *(p for encoder in ensemble.text_encoders for p in encoder.named_parameters())]


def test_a_stock_load_goes_into_every_expert(name, files, ensemble):
    """Nothing becomes trainable, and little is held."""
    size = unique_bytes(parameter for _, parameter in held(ensemble))
    pipe, (ink, oil) = ensemble.pipeline(), (files / "ink.safetensors", files / "oil.safetensors")
    before = once(pipe)
    pipe.load_lora_weights(str(oil), adapter_name="oil")
    assert same(ensemble, pipe, name, {"one": [(oil, 1)], "two": [(oil, 1)], "own": [(ink, 0.6), (oil, 1)]})
    assert [len(encoder.encoders) for encoder in ensemble.text_encoders] == [1] * len(ensemble.text_encoders)
    pipe.set_adapters(["oil"], [0.5])
    assert not any(parameter.requires_grad for _, parameter in held(ensemble))
    assert unique_bytes(p for _, p in held(ensemble)) == size + unique_bytes(p for key, p in held(ensemble) if "oil" in key.split("."))
    assert same(ensemble, pipe, name, {"own": [(ink, 0.6), (oil, 0.5)]})
    pipe.disable_lora()
    assert close(once(pipe), before)
    pipe.enable_lora()
    assert same(ensemble, pipe, name, {"one": [(oil, 0.5)]})
    pipe.unload_lora_weights()
    assert torch.equal(once(pipe), before)
    assert pipe.get_list_adapters() == {}
    assert not any("oil" in key.split(".") for key, _ in ensemble.denoiser.named_parameters())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "krea2"], indirect=True)
def test_one_expert_alone_can_be_given_one(name, files, ensemble):
    pipe, ink, oil = ensemble.pipeline(), files / "ink.safetensors", files / "oil.safetensors"
    mine = ink if name in WITHOUT_TEXT else oil
    before = drawn(ensemble, pipe, "one"), drawn(ensemble, pipe, "own")
    assert ensemble.load_lora(mine, experts=["two"], adapter_name="style", scale=0.5) == "style"
    assert same(ensemble, pipe, name, {"two": [(mine, 0.5)]})
    assert close(drawn(ensemble, pipe, "one"), before[0]) and close(drawn(ensemble, pipe, "own"), before[1])
    pipe.delete_adapters("style")
    assert same(ensemble, pipe, name, {"two": [], "one": []})


@ALIKE
def test_several_are_switched_by_name(name, files, ensemble):
    pipe, ink, oil = ensemble.pipeline(), files / "ink.safetensors", files / "oil.safetensors"
    first = ensemble.load_lora(ink)
    second = ensemble.load_lora(oil, adapter_name="oil")
    assert same(ensemble, pipe, name, {"one": [(oil, 1)]})  # the last is on, as in a stock pipeline
    pipe.set_adapters([first, second], [0.3, -0.4])
    assert same(ensemble, pipe, name, {"one": [(ink, 0.3), (oil, -0.4)], "own": [(ink, 0.6), (ink, 0.3), (oil, -0.4)]})
    pipe.delete_adapters([second])
    pipe.set_adapters([first], [1.0])
    assert same(ensemble, pipe, name, {"two": [(ink, 1)]})


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "krea2"], indirect=True)
def test_fused_ones_change_each_expert_once(name, files, ensemble):
    """Weights that experts share would otherwise be changed by every one of them."""
    pipe, ink = ensemble.pipeline(), files / "ink.safetensors"
    pipe.load_lora_weights(str(ink), adapter_name="ink")
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["ink"])
    assert same(ensemble, pipe, name, {"one": [(ink, 0.5)], "two": [(ink, 0.5)], "own": [(ink, 0.6), (ink, 0.5)]})
    pipe.unfuse_lora()
    pipe.set_adapters(["ink"], [1.0])
    assert same(ensemble, pipe, name, {"one": [(ink, 1)], "own": [(ink, 0.6), (ink, 1)]})


@ALIKE
def test_fused_into_one_expert_leaves_the_others_alone(name, files, ensemble):
    pipe, ink = ensemble.pipeline(), files / "ink.safetensors"
    ensemble.load_lora(ink, experts=["two"], adapter_name="ink")
    pipe.fuse_lora()
    assert same(ensemble, pipe, name, {"one": [], "two": [(ink, 1)], "own": [(ink, 0.6)]})


def test_the_attention_option_scales_what_was_loaded_and_not_what_an_expert_is(name, files, ensemble):
    pipe, ink, oil = ensemble.pipeline(), files / "ink.safetensors", files / "oil.safetensors"
    ensemble.load_lora(oil)
    taken = inspect.signature(pipe.__call__).parameters  # cross_…, joint_… or attention_kwargs
    option = next(name for name in taken if name.endswith("attention_kwargs"))
    for scale in (0.5, 0.5, 0.0):  # it leaves nothing behind
        found = drawn(ensemble, pipe, "own", **{option: {"scale": scale}})
        assert close(found, fused_latents(name, (ink, 0.6), *([(oil, scale)] if scale else [])))
    assert same(ensemble, pipe, name, {"own": [(ink, 0.6), (oil, 1)]})


class TestRefusals:
    @pytest.fixture
    def ensemble(self):
        return Ensemble.from_experts([FAMILIES["sd"].pipeline(seed, text_seed=0) for seed in range(2)], aggregator="mean")

    def test_a_name_that_is_no_experts(self, ensemble, tmp_path):
        with pytest.raises(UserError, match="no expert of this ensemble 'expert_2'; did you mean 'expert_"):
            ensemble.load_lora(write_lora("sd", tmp_path / "ink.safetensors"), experts=["expert_2"])

    def test_a_lora_of_another_family_leaves_nothing(self, ensemble, tmp_path):
        before = [key for key, _ in ensemble.denoiser.named_parameters()]
        for kind in ("flux", "sdxl"):
            with pytest.raises(UserError, match="does not fit expert 'expert_0'"):
                ensemble.pipeline().load_lora_weights(str(write_lora(kind, tmp_path / f"{kind}.safetensors", text=True)))
        assert [key for key, _ in ensemble.denoiser.named_parameters()] == before

    def test_a_name_twice(self, ensemble, tmp_path):
        file = write_lora("sd", tmp_path / "ink.safetensors")
        ensemble.load_lora(file, adapter_name="ink")
        with pytest.raises(UserError, match="called 'ink' is loaded already"):
            ensemble.load_lora(file, adapter_name="ink")
        with pytest.raises(UserError, match="'own_x' cannot be used"):
            ensemble.load_lora(file, adapter_name="own_x")

    def test_a_pipeline_of_ones_own_with_text_weights(self, ensemble, tmp_path):
        pipe = ensemble.pipeline()
        other = type(pipe)(**pipe.components, requires_safety_checker=False)
        other.load_lora_weights(str(write_lora("sd", tmp_path / "ink.safetensors")), adapter_name="ink")  # the denoiser alone
        assert other.get_list_adapters() == {"unet": ["ink"]}
        with pytest.raises(NotImplementedError, match=r"ensemble\.load_lora"):
            other.load_lora_weights(str(write_kohya("sd", tmp_path / "oil.safetensors")))

    def test_text_encoders_that_must_be_alike(self, tmp_path):
        ensemble = Ensemble.from_experts([FAMILIES["sd3"].pipeline(seed) for seed in range(2)], aggregator="mean")
        file = write_lora("sd3", tmp_path / "oil.safetensors", text=True)
        with pytest.raises(UserError, match="experts of family sd3 must have the same"):
            ensemble.load_lora(file, experts=["expert_1"])
        assert not hasattr(ensemble.denoiser, "peft_config")

    def test_fusing_into_stored_weights(self, tmp_path):
        ensemble = Ensemble.from_experts([FAMILIES["sd"].pipeline(0, block_out_channels=(32, 64))], aggregator="mean")
        store_weights(ensemble.denoiser.experts, "int8")
        with pytest.raises(NotImplementedError, match="stored in 8 bits"):
            ensemble.denoiser.fuse_lora()

    def test_hotswap(self, ensemble, tmp_path):
        with pytest.raises(NotImplementedError, match="hotswap"):
            ensemble.pipeline().load_lora_weights(str(write_lora("sd", tmp_path / "ink.safetensors")), hotswap=True)
