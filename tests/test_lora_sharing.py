"""Experts that are LoRAs on one base: its weights are in memory once, and the pictures are those of fused copies."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import trained
from test_pipeline import seeded
from tiny import quiet
from tiny_loras import FAMILIES, KOHYA, write_kohya, write_lora

from afa import Ensemble, UserError, only_expert
from afa.denoiser.lora import base_of, unique_bytes
from afa.experts.load import load_expert

SMALL = {"hidden": 32, "heads": 2, "depth": 1}
# A U-Net, a transformer, and one whose LoRAs have no part for text encoders: for laws that are kept by code which knows no family.
ALIKE = pytest.mark.parametrize("name", ["sd", "flux", "krea2"], indirect=True)


def latents(pipe, **changes):
    """What a pipeline draws in two steps, before the VAE."""
    call = {"prompt": "a red bicycle on a lawn", "num_inference_steps": 2, "height": 64, "width": 64, "generator": seeded()}
    return quiet(pipe)(**call | changes, output_type="latent").images


def once(pipe, **changes):
    """The same in one step, where other weights show as well."""
    return latents(pipe, num_inference_steps=1, **changes)


def tensors(*modules):
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def fused(name, loras):
    """A stock pipeline with LoRAs in its weights: (file, strength) each."""
    pipe = FAMILIES[name].pipeline(0, text_seed=0)
    for file, strength in loras:
        pipe.load_lora_weights(str(file), adapter_name="one")
        pipe.fuse_lora(components=pipe._lora_loadable_modules, lora_scale=strength)
        pipe.unload_lora_weights()
    return pipe


@functools.cache
def fused_latents(name, *loras):
    """What such a pipeline draws."""
    return once(fused(name, loras))


def close(one, other, tolerance=1e-5):
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(1, other.abs().max()))


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A base, and LoRAs on it; the last changes text encoders, too (except SD3's, which must be alike in an ensemble)."""
    root = tmp_path_factory.mktemp(name)
    FAMILIES[name].pipeline(0, text_seed=0).save_pretrained(root / "base")
    write_lora(name, root / "ink.safetensors", seed=1)
    write_lora(name, root / "oil.safetensors", seed=2, rank=3, text=name != "sd3")
    return root


def sources(root):
    base = root / "base"
    return [f"ink={base}+{root / 'ink.safetensors'}*0.5", f"both={base}+{root / 'ink.safetensors'}+{root / 'oil.safetensors'}*-0.7", f"plain={base}"]


@pytest.fixture(scope="module")
def fused_pipes(name, folder):
    ink, oil = folder / "ink.safetensors", folder / "oil.safetensors"
    return [fused(name, [(ink, 0.5)]), fused(name, [(ink, 1), (oil, -0.7)]), fused(name, [])]


@pytest.fixture(scope="module")
def shared(folder):
    return trained(Ensemble.from_experts(sources(folder), placement="layers", **SMALL))


@pytest.fixture(scope="module")
def copies(fused_pipes, shared):
    made = Ensemble.from_experts(fused_pipes, placement="layers", **SMALL)
    made.aggregators.load_state_dict(shared.aggregators.state_dict())
    return made


@ALIKE
def test_shared_experts_draw_what_fused_copies_draw(shared, copies):
    assert close(once(shared.pipeline()), once(copies.pipeline()))


def test_each_shared_expert_is_its_fused_copy(shared, fused_pipes):
    found = []
    for expert, alone in zip(shared.names, fused_pipes, strict=True):
        with only_expert(shared.denoiser, expert):
            found.append(once(shared.pipeline()))
        assert close(found[-1], once(alone))
    assert not close(found[0], found[2], 1e-3) and not close(found[1], found[2], 1e-3)  # the LoRAs do something


def test_the_weights_of_the_base_are_in_memory_once(folder, shared):
    base = load_expert(str(folder / "base"))
    experts, encoders = shared.denoiser.experts, shared.text_encoders
    adapters = [tensor for module in (experts, *encoders) for name, tensor in module.named_parameters() if "lora_" in name]
    assert adapters
    assert unique_bytes(tensors(experts, *encoders)) == unique_bytes(tensors(base.model, *base.text_encoders)) + unique_bytes(adapters)
    assert len({base_of(expert) for expert in experts}) == 1


@ALIKE
def test_casts_keep_them_shared_and_a_move_keeps_buffers_and_parameters_shared(folder):
    """To the meta device torch makes new parameters, as it does under torch.__future__'s flags."""
    ensemble = Ensemble.from_experts(sources(folder), aggregator="mean")
    parts = (ensemble.denoiser.experts, *ensemble.text_encoders)
    before = unique_bytes(tensor for tensor in tensors(*parts) if tensor.is_floating_point())
    for dtype in (torch.float64, torch.bfloat16):
        ensemble.to(dtype)
        after = unique_bytes(tensor for tensor in tensors(*parts) if tensor.is_floating_point())
        assert after * 4 == before * dtype.itemsize
        assert {tensor.dtype for tensor in tensors(*parts) if tensor.is_floating_point()} == {dtype}
    count = len({id(tensor) for tensor in tensors(ensemble.denoiser)})
    ensemble.denoiser.to("meta")
    assert len({id(tensor) for tensor in tensors(ensemble.denoiser)}) == count


@ALIKE
def test_what_is_saved_is_loaded_to_the_same_bits(folder, shared):
    expected = once(shared.pipeline())
    for bundle in (False, True):
        shared.save(folder / f"saved-{bundle}", bundle=bundle)
        loaded = Ensemble.load(folder / f"saved-{bundle}")
        assert torch.equal(once(loaded.pipeline()), expected)
        assert len({base_of(expert) for expert in loaded.denoiser.experts}) == 1  # a bundle has the base once, too
    assert len(list((folder / "saved-True").rglob("model_index.json"))) == 1


def test_training_gives_gradients_to_aggregators_only(name, shared):
    denoiser = shared.denoiser.train()
    denoiser.enable_gradient_checkpointing()
    assert all(key.startswith("aggregators.") for key, parameter in denoiser.named_parameters() if parameter.requires_grad)
    from family_models import MODELS

    call = MODELS[name].call()
    wide = {key: torch.cat([call[key]] * 3, dim=-1) for key in ("encoder_hidden_states", "pooled_projections") if key in call and name == "flux"}
    denoiser(**call | wide).sample.square().mean().backward()
    assert all(parameter.grad is None for parameter in denoiser.experts.parameters())
    assert next(iter(denoiser.aggregators.values())).conv_out.weight.grad.abs().max() > 0
    denoiser.zero_grad()
    denoiser.eval().disable_gradient_checkpointing()


@pytest.mark.parametrize("kind", KOHYA)
def test_loras_of_kohyas_scripts_are_read(kind, tmp_path):
    FAMILIES[kind].pipeline(0, text_seed=0).save_pretrained(tmp_path / "base")
    file = write_kohya(kind, tmp_path / "kohya.safetensors")
    ensemble = Ensemble.from_experts([f"a={tmp_path / 'base'}+{file}*0.9", f"b={tmp_path / 'base'}"], aggregator="mean")
    with only_expert(ensemble.denoiser, "a"):
        found = latents(ensemble.pipeline())
    assert close(found, latents(fused(kind, [(file, 0.9)])))
    assert not close(found, latents(fused(kind, [])), 1e-3)


def test_a_dora_is_shared_too(tmp_path):
    FAMILIES["sd"].pipeline(0, text_seed=0).save_pretrained(tmp_path / "base")
    file = write_lora("sd", tmp_path / "dora.safetensors", use_dora=True)
    ensemble = Ensemble.from_experts([f"a={tmp_path / 'base'}+{file}", f"b={tmp_path / 'base'}"], aggregator="mean")
    with only_expert(ensemble.denoiser, "a"):
        assert close(once(ensemble.pipeline()), fused_latents("sd", (file, 1)))


@ALIKE
def test_an_expert_alone_on_its_base_has_its_lora_in_its_weights(folder):
    ensemble = Ensemble.from_experts(sources(folder)[:1], aggregator="mean")
    assert not any("lora" in key for key, _ in ensemble.denoiser.named_parameters())


def test_equal_text_encoders_of_other_strengths_are_told_apart(tmp_path):
    FAMILIES["sd"].pipeline(0, text_seed=0).save_pretrained(tmp_path / "base")
    file = write_lora("sd", tmp_path / "oil.safetensors", text=True)
    base = tmp_path / "base"
    ensemble = Ensemble.from_experts([f"a={base}+{file}", f"b={base}+{file}*0.5", f"c={base}+{file}"], aggregator="mean")
    assert ensemble.text_encoders[0].of_expert == [0, 1, 0]


class TestRefusals:
    @pytest.fixture
    def base(self, tmp_path) -> Path:
        FAMILIES["sd"].pipeline(0, text_seed=0).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def load(self, base, file):
        return Ensemble.from_experts([f"a={base}+{file}", f"b={base}"], aggregator="mean")

    def test_weights_that_find_no_place_are_counted(self, base, tmp_path):
        file = write_lora("sd", tmp_path / "ink.safetensors")
        held = load_file(file)
        first = next(key for key in sorted(held) if "down_blocks.0" in key)
        lost = [first.replace("down_blocks.0", "down_blocks.7"), "text_encoder_9.layer.lora_A.weight"]
        held |= {key: torch.zeros(2, 2) for key in lost}
        save_file(held, file)
        with pytest.raises(UserError, match=f"2 of its {len(held)} weights found no place"):
            self.load(base, file)

    def test_a_lora_of_another_family(self, base, tmp_path):
        with pytest.raises(UserError, match="does not fit expert 'a'"):
            self.load(base, write_lora("flux", tmp_path / "flux.safetensors"))

    @pytest.mark.parametrize(
        ("key", "kind"),
        [("oft_blocks", "OFT"), ("on_input", "IA3"), ("hada_w1_a", "lacks hada_w1_b"), ("lokr_w2", "lacks lokr_w1")],
    )
    def test_other_kinds_by_name(self, base, tmp_path, key, kind):
        save_file({f"lora_unet_mid_block_attentions_0_proj_in.{key}": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=kind):
            self.load(base, tmp_path / "other.safetensors")
