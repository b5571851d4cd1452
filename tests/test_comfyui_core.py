"""Ensembles on ComfyUI's real core: the same pictures as in ComfyUI with one expert, and as in diffusers with several.

Run with COMFYUI=FOLDER of ComfyUI 0.3.64 or later, whose requirements (without torchvision, torchaudio) can be imported.
"""

import functools
import gc
import inspect
import itertools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import comfyui_core
import pytest
import torch
from comfyui_core import (
    CHROMA,
    FLUX,
    SD3,
    SD15,
    SD20,
    SDXL,
    chroma_model,
    flux_model,
    sample,
    sd3_model,
    unet_model,
)
from original_layout import unet_tensors
from safetensors.torch import save_file
from tiny import sd_pipeline, sd_unet, sdxl_pipeline
from tiny_chroma import chroma_pipeline
from tiny_transformers import flux_pipeline, sd3_pipeline

from afa import Ensemble, UserError
from afa.comfyui.experts import combine, provenance
from afa.comfyui.install import PACK
from afa.comfyui.nodes import AfaEncode, AfaEnsemble, AfaStrength, AfaWeights
from afa.comfyui.texts import joined
from afa.files import sha256

pytestmark = pytest.mark.skipif(comfyui_core.COMFYUI is None, reason="COMFYUI names no folder of ComfyUI")
AGGREGATORS = {"hidden": 32, "heads": 2, "depth": 1}
SAME = 1e-4  # see apart
EXACT = torch.float64  # to compare with diffusers: sampling with guidance enlarges what single precision rounds
CLIP_SHAPE = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def core():
    loaded = comfyui_core.load_core()
    gc.collect()
    gc.freeze()  # the core collects garbage at every sampling
    return loaded


class Family:
    """A family at tiny width: pipelines, MODELs of ComfyUI, prompts, and a call of the diffusers denoiser."""

    def __init__(self, name):
        self.name = name
        self.flux, self.sd3, self.chroma, self.xl = (name == one for one in ("flux", "sd3", "chroma", "sdxl"))
        self.channels = 16 if self.flux or self.sd3 or self.chroma else 4
        self.text, self.pooled = {"flux": (24, 16), "sd3": (48, 40), "sdxl": (40, 16)}.get(name, (24, 0))  # widths

    @functools.cache  # noqa: B019  # families live as long as the module
    def pipeline(self, seed):
        if self.flux:
            return flux_pipeline(seed, **FLUX)
        if self.sd3:
            return sd3_pipeline(seed, **SD3)
        if self.chroma:
            return chroma_pipeline(seed, **CHROMA)
        if self.xl:
            return sdxl_pipeline(seed, **SDXL)
        return sd_pipeline(seed, prediction_type="v_prediction" if self.name == "sd20" else "epsilon", **(SD20 if self.name == "sd20" else SD15))

    def model(self, core, seed, copy=0, dtype=torch.float32):
        """A MODEL with the weights of that seed. copy: one with the same weights, but another network"""
        return self._model(core, self.pipeline(seed), copy, dtype).clone()

    @functools.cache  # noqa: B019  # families live as long as the module
    def _model(self, core, pipe, copy=0, dtype=torch.float32):
        if self.flux:
            return flux_model(core, pipe.transformer, dtype)
        if self.sd3:
            return sd3_model(core, pipe.transformer, dtype)
        if self.chroma:
            return chroma_model(core, pipe.transformer, dtype)
        return unet_model(core, pipe.unet, {"sd15": "SD15", "sd20": "SD20", "sdxl": "SDXL"}[self.name], dtype)

    def models(self, core, dtype=torch.float32):
        return [self.model(core, seed, dtype=dtype) for seed in (0, 1)]

    def prompt(self, seed, tokens=7):
        """A CONDITIONING with random states."""
        generator = torch.Generator().manual_seed(seed)
        settings = {"pooled_output": torch.randn(1, self.pooled, generator=generator) if self.pooled else None}
        return [[torch.randn(1, tokens, self.text, generator=generator), settings]]

    def noise(self, batch=2, height=16, width=16):
        return torch.randn(batch, self.channels, height, width, generator=torch.Generator().manual_seed(9))

    def predict(self, denoiser, x, time, prompts):
        """The diffusers denoiser's prediction. prompts: of every expert, or of one for all; time: as ComfyUI's network gets it"""
        batch, x = len(x), x.to(EXACT)
        prompts = [[[one[0][0].to(EXACT), {name: tensor.to(EXACT) for name, tensor in one[0][1].items() if tensor is not None}]] for one in prompts]
        states = torch.cat([one[0][0] for one in prompts], -1).expand(batch, -1, -1)
        if self.xl:  # the states of encoder 1 of every expert stand before those of encoder 2
            halves = [one[0][0].split(denoiser.text_widths, -1) for one in prompts]
            states = torch.cat([*(one for one, _ in halves), *(other for _, other in halves)], -1).expand(batch, -1, -1)
        pooled = torch.cat([one[0][1]["pooled_output"] for one in prompts], -1).expand(batch, -1) if self.pooled else None
        if self.channels == 4:
            sides = [float(side * 8) for side in x.shape[-2:]]
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[*sides, 0, 0, *sides]] * batch, dtype=EXACT)} if self.xl else None
            return denoiser(x, time, states, added_cond_kwargs=added).sample
        interface = denoiser.interface
        call = interface.conditions(denoiser.config, (states, states.new_ones(states.shape[:2]) if self.chroma else pooled), None)
        made = interface.denoiser_kwargs(denoiser.config, x, time if self.sd3 else time * 1000, call)
        return interface.to_latents(denoiser(**made).sample, x.shape[-2:])


FAMILIES = {name: Family(name) for name in ("sd15", "sd20", "sdxl", "flux", "sd3", "chroma")}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make an ensemble of a family's experts 0 and 1, once: -> its folder."""

    @functools.cache
    def make(family, trained=True, shared=False, **options):
        folder = tmp_path_factory.mktemp("ensembles") / "mine"
        options = {name: value for name, value in {**AGGREGATORS, **options}.items() if value is not None}
        ensemble = Ensemble.from_experts([family.pipeline(seed) for seed in (0, 1)], **options)
        ensemble.denoiser.share_guidance_weights = shared
        torch.manual_seed(5)
        for name, parameter in ensemble.aggregators.named_parameters():
            if trained and name.endswith("conv_out.weight"):
                torch.nn.init.normal_(parameter)
        ensemble.save(folder, bundle=True)
        return folder

    return make


@functools.cache
def exact(mine):
    """The diffusers denoiser of a saved ensemble, in double precision."""
    return Ensemble.load(mine, dtype=EXACT).denoiser


def in_diffusers(core, family, mine, model, positive, negative, noise, steps=3, cfg=5.0):
    """Euler on ComfyUI's sigmas around the diffusers denoiser: the algorithm of k-diffusion, with both predictions in one batch."""
    sampling = model.get_model_object("model_sampling")
    sigmas = core.samplers.calculate_sigmas(sampling, "normal", steps)
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas):
            time, given = sampling.timestep(sigma[None]).float().expand(len(x)), sampling.calculate_input(sigma[None], x)
            both = [family.predict(exact(mine), given, time, prompts).float() for prompts in (positive, negative)]
            denoised, without = (sampling.calculate_denoised(sigma[None], one, x) for one in both)
            denoised = without + cfg * (denoised - without)
            x = x + (x - denoised) / sigma * (after - sigma)
    return model.model.process_latent_out(sampling.inverse_noise_scaling(sigmas[-1], x))


def apart(a, b):
    """The largest difference as a share of the latents' own spread: tiny random experts reach hundreds."""
    return float((a - b).abs().max() / b.std())


def test_one_expert_twice_is_comfyui_itself_bit_for_bit(core, made, family):
    mine = made(family, trained=False, placement="layers")
    model, other = family.model(core, 0), family.model(core, 0, copy=1)
    positive, negative = family.prompt(1), family.prompt(2)
    for size in ((16, 16), (18, 11)):
        noise = family.noise(2, *size)
        stock = sample(core, model, positive, negative, noise)
        for pair in ([model, model], [model, other]):
            assert torch.equal(sample(core, combine(pair, mine), positive, negative, noise), stock)
        assert torch.equal(sample(core, model, positive, negative, noise), stock)


@pytest.mark.parametrize("aggregator", ["sabw", "stitch"])
def test_two_experts_are_in_comfyui_what_they_are_in_diffusers(core, made, family, aggregator):
    mine = made(family, aggregator=aggregator, placement="layers")
    models = family.models(core, EXACT)
    positive, negative, noise = family.prompt(1), family.prompt(2), family.noise()
    found = sample(core, combine(models, mine), positive, negative, noise)
    assert apart(found, in_diffusers(core, family, mine, models[0], [positive], [negative], noise)) <= SAME
    assert apart(found, sample(core, models[0], positive, negative, noise)) > 0.01
    loaded = [one.model.model for one in core.model_management.current_loaded_models if one.model is not None]
    assert all(any(model.model is one for one in loaded) for model in models)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd15", {"placement": "blocks"}),
        ("sd15", {"placement": "out"}),
        ("sd15", {"placement": "layers", "attention_up_to": 8}),
        ("sd15", {"placement": "IN01,OUT03", "aggregator": "stitch"}),
        ("flux", {"placement": "double"}),
        ("sd3", {"placement": "every-2", "text_stream": "fused"}),
        ("flux", {"placement": "every-2", "text_stream": "fused"}),
        ("sd15", {"aggregator": "mean", "placement": "layers", "hidden": None, "heads": None, "depth": None}),
    ],
    ids=str,
)
def test_every_placement_and_kind_is_read_from_the_folder(core, made, name, options):
    family = FAMILIES[name]
    mine = made(family, **options)
    models, positive, negative, noise = family.models(core, EXACT), family.prompt(1), family.prompt(2), family.noise()
    found = sample(core, combine(models, mine), positive, negative, noise, steps=2)
    assert apart(found, in_diffusers(core, family, mine, models[0], [positive], [negative], noise, steps=2)) <= SAME


def test_every_expert_reads_its_own_text(core, made, family):
    mine = made(family, placement="layers")
    models = family.models(core, EXACT)
    prompts, noise = {seed: family.prompt(seed) for seed in (1, 2, 3, 4)}, family.noise()
    pairs = [[prompts[1], prompts[2]], [prompts[3], prompts[4]]]
    positive, negative = (joined(pair, core.conds) for pair in pairs)
    model = combine(models, mine)
    found = sample(core, model, positive, negative, noise)
    assert apart(found, in_diffusers(core, family, mine, models[0], *pairs, noise)) <= SAME
    assert apart(found, sample(core, model, prompts[1], prompts[3], noise)) > 1e-3
    # a MODEL that is no ensemble takes the first expert's text of it
    assert torch.equal(sample(core, models[0], positive, negative, noise), sample(core, models[0], prompts[1], prompts[3], noise))
    # prompts of another length run in a pass of their own
    longer = joined([family.prompt(5, tokens=11), family.prompt(6, tokens=11)], core.conds)
    assert sample(core, model, longer, negative, noise).isfinite().all()


def test_text_that_was_changed_after_it_was_encoded_is_refused(core, made):
    family = FAMILIES["sd15"]
    mine = made(family)
    model = combine(family.models(core), mine)
    both = joined([family.prompt(1), family.prompt(2)], core.conds)
    mixed = [[both[0][0] * 0.5, both[0][1]]]
    with pytest.raises(UserError, match="changed after AFA Encode"):
        sample(core, model, mixed, both, family.noise())
    three = joined([family.prompt(seed) for seed in (1, 2, 3)], core.conds)
    with pytest.raises(UserError, match="has 3 CLIPs, the ensemble has 2"):
        sample(core, model, three, three, family.noise())
    with pytest.raises(UserError, match="7, 9 tokens"):
        joined([family.prompt(1), family.prompt(2, tokens=9)], core.conds)
    with pytest.raises(UserError, match="1, 2 parts"):
        joined([family.prompt(1), family.prompt(1) * 2], core.conds)


def tiny_clip(core, seed):
    """ComfyUI's CLIP for SD 1.x with its own tokenizer, one layer deep."""
    from comfy import sd1_clip

    torch.manual_seed(seed)
    target = SimpleNamespace(params={}, clip=sd1_clip.SD1ClipModel, tokenizer=sd1_clip.SD1Tokenizer)
    clip = core.sd.CLIP(target, model_options={"clip_l_model_config": CLIP_SHAPE})
    for parameter in clip.cond_stage_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return clip


def test_the_node_encodes_with_every_clip(core):
    clips = [tiny_clip(core, seed) for seed in (0, 1)]
    (found,) = AfaEncode().encode("a red (bicycle:1.2)", clip_1=clips[0], clip_2=clips[1])
    each = [clip.encode_from_tokens_scheduled(clip.tokenize("a red (bicycle:1.2)")) for clip in clips]
    carried = found[0][1]["model_conds"]
    for place, one in enumerate(each):
        assert torch.equal(carried[f"afa_text_{place}"].cond, one[0][0])
        assert torch.equal(carried[f"afa_pooled_{place}"].cond, one[0][1]["pooled_output"])
    assert torch.equal(found[0][0], each[0][0][0]) and not torch.equal(each[0][0][0], each[1][0][0])


# --- LoRAs and patches ---


def lora(model, seed, scale=0.1):
    """A clone of a MODEL with a difference on its weights, as ComfyUI's loaders add it."""
    generator, clone = torch.Generator().manual_seed(seed), model.clone()
    names = [name for name, tensor in model.model.state_dict().items() if name.startswith("diffusion_model.") and tensor.ndim == 2]
    state = model.model.state_dict()
    added = {name: ("diff", (torch.randn(state[name].shape, generator=generator) * scale,)) for name in names}
    assert len(clone.add_patches(added)) == len(names)
    return clone, added


def with_difference(core, family, added):
    """A MODEL of its own whose weights have the difference to expert 0."""
    model = family._model.__wrapped__(family, core, family.pipeline(0))
    state = model.model.state_dict()
    model.model.load_state_dict({name: tensor + added[name][1][0] if name in added else tensor for name, tensor in state.items()})
    return model


@pytest.mark.parametrize(("name", "reload"), [("sd15", False), ("flux", False), ("sd3", False), ("sd15", True), ("sd3", True)])
def test_loras_of_one_checkpoint_are_experts_of_their_own(core, made, name, reload):
    family = FAMILIES[name]
    mine = made(family, placement="layers")
    base, positive, negative, noise = family.model(core, 0), family.prompt(1), family.prompt(2), family.noise()
    if reload:  # as the core's own loaders leave it
        if not hasattr(base, "deepclone_multigpu"):
            pytest.skip("a core that cannot load a file again")
        base.cached_patcher_init = (family._model.__wrapped__, (family, core, family.pipeline(0)))
    stock = sample(core, base, positive, negative, noise)
    first, one = lora(base, 1)
    second, two = lora(base, 2)
    sample(core, second, positive, negative, noise)  # one of them is loaded, with its patches in the weights
    for pair, differences in (([first, second], (one, two)), ([base, second], ({}, two)), ([first, first], (one, one))):
        separate = [with_difference(core, family, added) for added in differences]
        expected = sample(core, combine(separate, mine), positive, negative, noise)
        assert apart(sample(core, combine(pair, mine), positive, negative, noise), expected) <= SAME
    assert torch.equal(sample(core, base, positive, negative, noise), stock)


def test_a_model_that_can_neither_be_copied_nor_read_again_is_refused(core, made):
    family = FAMILIES["sd15"]
    base = family.model(core, 0)
    second, _ = lora(base, 2)
    second.is_dynamic = lambda: True  # its weights are streamed to the GPU, and not in memory
    with pytest.raises(UserError, match=r"MODEL 2 .expert_1. and a MODEL before it share weights of a loader"):
        combine([base, second], made(family))


def test_equal_models_are_held_once(core, made):
    family = FAMILIES["sd15"]
    mine = made(family)
    base = family.model(core, 0)
    first, _ = lora(base, 1)
    assert len(combine([base, base.clone()], mine).get_additional_models_with_key("afa")) == 0
    assert len(combine([first, first.clone()], mine).get_additional_models_with_key("afa")) == 0
    made_of_both = combine([base, first], mine)
    assert made_of_both.get_additional_models_with_key("afa")[0].model is not base.model


def test_what_would_reach_the_first_expert_alone_is_refused(core, made):
    family = FAMILIES["sd15"]
    mine = made(family)
    model = combine(family.models(core), mine)
    prompt, noise = family.prompt(1), family.noise()
    with pytest.raises(UserError, match="after AFA Ensemble patches weights"):
        sample(core, lora(model, 1)[0], prompt, prompt, noise)
    stock = sample(core, model, prompt, prompt, noise)
    hooked = [[prompt[0][0], {"hooks": core.hooks.create_hook_lora({}, 1.0, 1.0)}]]
    with pytest.raises(UserError, match="has hooks"):
        sample(core, model, hooked, prompt, noise)
    assert torch.equal(sample(core, model, prompt, prompt, noise), stock)
    wrapped = model.clone()
    wrapped.add_wrapper_with_key("diffusion_model", "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    with pytest.raises(UserError, match=f"wraps the network .{__name__}"):
        sample(core, wrapped, prompt, prompt, noise)
    with pytest.raises(UserError, match="is an ensemble itself"):
        combine([model, model], mine)
    divided = model.clone()
    divided.set_additional_models("multigpu", [family.model(core, 0)])
    with pytest.raises(UserError, match="divided among GPUs"):
        sample(core, divided, prompt, prompt, noise)


@pytest.mark.parametrize("name", ["input_block_patch", "output_block_patch", "emb_patch", "middle_patch", "post_input", "another"])
@pytest.mark.parametrize("before", [True, False])
def test_patches_that_an_ensemble_leaves_out_are_refused_by_name(core, made, name, before):
    family = FAMILIES["sd15"]
    mine = made(family)
    models = family.models(core)
    if before:
        models[1].set_model_patch(lambda *args: args, name)
    with pytest.raises(UserError, match=f"has the patch {name}"):
        model = combine(models, mine)
        model.set_model_patch(lambda *args: args, name)
        sample(core, model, family.prompt(1), family.prompt(2), family.noise())


def halved(q, k, v, extra):
    return q * 0.5, k, v


def by_block(q, k, v, extra_options, **more):
    """A patch in FLUX's attention that is another one at every block."""
    place = extra_options["block_index"] + (extra_options["block_type"] == "single") * extra_options["total_blocks"]
    start, end = extra_options["img_slice"]
    assert end == q.shape[2]
    return {"q": torch.cat([q[:, :, :start], q[:, :, start:] / (2 + place)], dim=2), "k": k, "v": v}


def test_a_patch_in_the_attention_of_flux_knows_its_block(core, made):
    family = FAMILIES["flux"]
    mine = made(family, trained=False, placement="layers")
    model, positive, negative, noise = family.model(core, 0), family.prompt(1), family.prompt(2), family.noise()
    patched = model.clone()
    patched.set_model_patch(by_block, "attn1_patch")
    expected = sample(core, patched, positive, negative, noise)
    if torch.equal(expected, sample(core, model, positive, negative, noise)):
        pytest.skip("a core whose FLUX.1 reads no patches in attention")
    afterwards = combine([model, family.model(core, 0, copy=1)], mine)
    afterwards.set_model_patch(by_block, "attn1_patch")
    assert torch.equal(sample(core, afterwards, positive, negative, noise), expected)


def test_scaled_places_of_flux_are_those_of_comfyui(core, made):
    family = FAMILIES["flux"]
    mine = made(family, trained=False, placement="layers")
    models, positive, negative, noise = [family.model(core, 0, copy=copy) for copy in (0, 1)], family.prompt(1), family.prompt(2), family.noise()
    scaled = models[0].clone()
    scaled.model_options["transformer_options"]["rope_options"] = {"scale_x": 0.5, "shift_y": 3.0}
    expected = sample(core, scaled, positive, negative, noise)
    if torch.equal(expected, sample(core, models[0], positive, negative, noise)):
        pytest.skip("a core without scaled places")
    assert torch.equal(sample(core, combine([scaled, models[1]], mine), positive, negative, noise), expected)


@pytest.mark.parametrize("setting", ["txt_norm", "global_modulation", "yak_mlp", "txt_ids_dims", "vec_in_dim", "patch_size"])
def test_a_flux_of_another_kind_is_refused(core, made, setting):
    family = FAMILIES["flux"]
    models = [family._model.__wrapped__(family, core, family.pipeline(seed)) for seed in (0, 1)]
    network = models[1].model.diffusion_model
    if setting == "patch_size":
        network.patch_size = 1
    else:
        setattr(network.params, setting, None if setting == "vec_in_dim" else [3])
    with pytest.raises(UserError, match="a Flux .*FLUX.2, .* is not served in ComfyUI"):
        combine(models, made(family))


@pytest.mark.parametrize(("setting", "value"), [("patch_size", 4), ("register_length", 2), ("context_processor", torch.nn.Identity()), ("y_embedder", None)])
def test_an_mmdit_of_another_kind_is_refused(core, made, setting, value):
    family = FAMILIES["sd3"]
    models = [family._model.__wrapped__(family, core, family.pipeline(seed)) for seed in (0, 1)]
    setattr(models[1].model.diffusion_model, setting, value)
    with pytest.raises(UserError, match="an MMDiT .* is not served in ComfyUI"):
        combine(models, made(family))


def test_a_chroma_of_another_depth_is_refused(core, made):
    family = FAMILIES["chroma"]
    models = [family._model.__wrapped__(family, core, family.pipeline(seed)) for seed in (0, 1)]
    del models[1].model.diffusion_model.single_blocks[37]
    with pytest.raises(UserError, match="a Chroma with patches of 2, 19 double and 37 single blocks is not served"):
        combine(models, made(family, placement="out"))


def test_a_model_is_itself_after_an_ensemble_of_it_was_sampled(core, made, family):
    mine = made(family, placement="out")
    models, prompt, noise = family.models(core), family.prompt(1), family.noise()
    stock = sample(core, models[0], prompt, prompt, noise)
    both = combine(models, mine)
    for _ in range(2):
        assert apart(sample(core, both, prompt, prompt, noise), stock) > 1e-3
        assert torch.equal(sample(core, models[0], prompt, prompt, noise), stock)


def test_a_patch_in_attention_reaches_its_own_expert_or_all(core, made):
    family = FAMILIES["sd15"]
    mine = made(family, trained=False, placement="layers")
    model, positive, negative, noise = family.model(core, 0), family.prompt(1), family.prompt(2), family.noise()
    patched = model.clone()
    patched.set_model_attn2_patch(halved)
    stock, expected = (sample(core, one, positive, negative, noise) for one in (model, patched))
    assert apart(stock, expected) > 1e-3
    afterwards = combine([model, family.model(core, 0, copy=1)], mine)
    afterwards.set_model_attn2_patch(halved)
    twin = family.model(core, 0, copy=1)
    twin.set_model_attn2_patch(halved)
    for both in (afterwards, combine([patched, twin], mine)):
        assert torch.equal(sample(core, both, positive, negative, noise), expected)
    one = sample(core, combine([model, twin], mine), positive, negative, noise)
    assert apart(one, stock) > 1e-3 and apart(one, expected) > 1e-3
    # of two MODELs of one network, one patched in attention, each stays itself
    again = sample(core, combine([model, patched], mine), positive, negative, noise)
    assert torch.equal(again, one)


def test_what_surrounds_another_expert_is_said_to_be_left_out(core, made, caplog):
    family = FAMILIES["sd15"]
    mine = made(family)
    models = family.models(core)
    models[1].set_model_sampler_cfg_function(lambda args: args["cond"])
    with caplog.at_level(logging.WARNING, "afa"):
        combine(models, mine)
    assert "MODEL 2 (expert_1): sampler_cfg_function is not used" in caplog.text


# --- ControlNets ---


def controlled(core, model, kind=None):
    """A prompt with a real ControlNet of the U-Net's architecture, with random weights, or with what `kind` makes."""
    from comfy.cldm import cldm

    settings = {name: value for name, value in model.model.model_config.unet_config.items() if name != "out_channels"}
    torch.manual_seed(3)
    network = cldm.ControlNet(**{"transformer_depth_output": None, **settings}, hint_channels=3, operations=core.ops.disable_weight_init)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cpu = torch.device("cpu")
    control = core.controlnet.ControlNet(network, load_device=cpu, manual_cast_dtype=torch.float32)
    return control.set_cond_hint(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)), 0.8, (0.0, 1.0))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_controlnet_works_as_in_comfyui(core, made, name):
    family = FAMILIES[name]
    mine = made(family, trained=False, placement="layers")
    model, noise = family.model(core, 0), family.noise()
    control = controlled(core, model)
    positive, negative = (family.prompt(seed) for seed in (1, 2))
    free = sample(core, model, positive, negative, noise)
    positive[0][1]["control"] = control
    stock = sample(core, model, positive, negative, noise)
    assert apart(stock, free) > 1e-3
    both = combine([model, family.model(core, 0, copy=1)], mine)
    assert torch.equal(sample(core, both, positive, negative, noise), stock)


def test_residuals_of_a_t2i_adapter_and_of_controlnets_of_transformers_are_added_where_comfyui_adds_them(core, made):
    class Given(core.controlnet.ControlBase):
        """Residuals of the right sizes, drawn once; what networks of several kinds would compute."""

        def __init__(self, made):
            super().__init__()
            self.made = made

        def get_control(self, x, t, cond, batched_number, transformer_options):
            def drawn(place, shape):
                return None if shape is None else torch.randn(len(x), *shape, generator=torch.Generator().manual_seed(place))

            given = {name: list(itertools.starmap(drawn, enumerate(shapes))) for name, shapes in self.made.items()}
            return {"input": [], "middle": [], "output": []} | given

    cases = {
        "sd15": {
            "input": [(64, 8, 8), (32, 8, 8), None, (32, 16, 16)],  # what comes last is used first
            "middle": [(64, 8, 8)],
            "output": [(32, 16, 16), None, (32, 8, 8), (64, 8, 8)],
        },
        "flux": {"input": [(64, 32), None], "output": [None, (64, 32)]},
        "sd3": {"output": [(64, 128), None]},
    }
    for name, shapes in cases.items():
        family = FAMILIES[name]
        mine = made(family, trained=False, placement="layers")
        model, noise, control = family.model(core, 0), family.noise(), Given(shapes)
        positive, negative = family.prompt(1), family.prompt(2)
        free = sample(core, model, positive, negative, noise)
        positive[0][1]["control"] = control
        stock = sample(core, model, positive, negative, noise)
        assert apart(stock, free) > 1e-3
        both = combine([model, family.model(core, 0, copy=1)], mine)
        assert torch.equal(sample(core, both, positive, negative, noise), stock)
        for strange in ([(16, 32)],) if name in ("flux", "sd3") else ([(32, 16, 16)] * 9, [(32, 8, 8)], [(64, 16, 16)]):
            control.made = {"output" if name == "sd3" else "input": strange}
            with pytest.raises(UserError, match="take one of their architecture"):
                sample(core, both, positive, negative, noise)


def test_two_prompts_and_areas_work_as_in_comfyui(core, made):
    family = FAMILIES["sd15"]
    mine = made(family, trained=False)
    model, noise = family.model(core, 0), family.noise()
    area = [[family.prompt(3)[0][0], {"area": (8, 12, 4, 2), "strength": 1.0}]]
    positive = family.prompt(1) + family.prompt(4) + area
    both = combine([model, family.model(core, 0, copy=1)], mine)
    assert torch.equal(sample(core, both, positive, family.prompt(2), noise), sample(core, model, positive, family.prompt(2), noise))
    masked = strong(both, "2", 0.5, mask=torch.ones(1, 64, 64))
    with pytest.raises(UserError, match="area"):
        sample(core, masked, positive, family.prompt(2), noise)


def test_shared_guidance_is_that_of_diffusers(core, made):
    family = FAMILIES["sd15"]
    mine = made(family, placement="layers", aggregator="stitch")
    shared = made(family, shared=True, placement="layers", aggregator="stitch")
    models, noise = family.models(core, EXACT), family.noise()
    model, positive, negative = combine(models, shared), family.prompt(1), family.prompt(2)
    found = sample(core, model, positive, negative, noise, steps=1)
    sampling = models[0].get_model_object("model_sampling")
    sigma = core.samplers.calculate_sigmas(sampling, "normal", 1)[:1]
    x = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), True)
    given, time = sampling.calculate_input(sigma, x).repeat(2, 1, 1, 1), sampling.timestep(sigma).float().expand(4)
    text = torch.cat([one[0][0].expand(2, -1, -1) for one in (negative, positive)])
    with torch.no_grad():
        without, prompted = exact(shared)(given.to(EXACT), time, text.to(EXACT)).sample.float().chunk(2)
    expected = sampling.calculate_denoised(sigma, without + 5 * (prompted - without), x)
    assert apart(found, models[0].model.process_latent_out(expected)) <= SAME
    assert apart(found, sample(core, combine(models, mine), positive, negative, noise, steps=1)) > 1e-3
    # a negative prompt of another length runs in a pass of its own, after the one with the prompt
    assert sample(core, model, positive, family.prompt(2, tokens=40), noise).isfinite().all()
    with pytest.raises(UserError, match="there are 2 prompts"):
        sample(core, model, positive * 2, negative, noise)


# --- strengths and maps ---


def strong(model, expert, strength, **more):
    return AfaStrength().strengthen(model, expert, strength, **more)[0]


def test_strengths_choose_experts_in_parts_of_the_picture_and_of_the_steps(core, made, family):
    mine = made(family, placement="out")
    models = family.models(core)
    positive, negative, noise = family.prompt(1), family.prompt(2), family.noise()
    model = combine(models, mine)
    stock = [sample(core, one, positive, negative, noise) for one in models]
    assert torch.equal(sample(core, strong(model, "expert_1", 0), positive, negative, noise), stock[0])
    assert torch.equal(sample(core, strong(model, "1", 0), positive, negative, noise), stock[1])
    assert torch.equal(sample(core, strong(model, "1", 1), positive, negative, noise), sample(core, model, positive, negative, noise))
    left = torch.zeros(1, 128, 128)
    left[..., :64] = 1
    halves = strong(strong(model, "1", 0, mask=left), "2", 0, mask=1 - left)
    one_step = [sample(core, one, positive, negative, noise, steps=1) for one in models]
    expected = torch.cat([one_step[1][..., :8], one_step[0][..., 8:]], -1)
    assert torch.equal(sample(core, halves, positive, negative, noise, steps=1), expected)
    each = torch.stack([torch.zeros(128, 128), torch.ones(128, 128)])  # a mask for each of the two pictures
    by_picture = strong(strong(model, "1", 0, mask=each), "2", 0, mask=1 - each)
    assert torch.equal(sample(core, by_picture, positive, negative, noise), torch.stack([stock[0][0], stock[1][1]]))
    # the first half of the steps by the one, the rest by the other: as ComfyUI samples in two parts
    when = strong(strong(model, "2", 0, end_percent=0.4), "1", 0, start_percent=0.4001)
    found = sample(core, when, positive, negative, noise, steps=4)
    sampling = models[0].get_model_object("model_sampling")
    sigmas = core.samplers.calculate_sigmas(sampling, "normal", 4)
    first = int((sigmas[:-1] >= sampling.percent_to_sigma(0.4)).sum())
    assert 0 < first < 4
    begun = sample(core, models[0], positive, negative, noise, steps=4, last_step=first)
    ended = comfyui_sample_from(core, models[1], positive, negative, begun, first)
    assert apart(found, ended) <= SAME


def comfyui_sample_from(core, model, positive, negative, latents, start):
    how = (4, 5.0, "euler", "normal", positive, negative, latents)
    with torch.inference_mode():
        return core.sample.sample(model, torch.zeros_like(latents), *how, start_step=start, disable_noise=True, disable_pbar=True, seed=0)


def test_strengths_that_cannot_be_are_refused(core, made):
    family = FAMILIES["sd15"]
    mine = made(family)
    models, prompt, noise = family.models(core), family.prompt(1), family.noise()
    model = combine(models, mine)
    for expert in ("3", "0", "photo", ""):
        with pytest.raises(UserError, match="no expert of this ensemble"):
            strong(model, expert, 1)
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="strength of expert 'expert_0' is"):
            strong(model, "1", value)
    with pytest.raises(UserError, match="contains no step"):
        strong(model, "1", 1, start_percent=0.5, end_percent=0.5)
    with pytest.raises(UserError, match="this MODEL is no ensemble"):
        strong(models[0], "1", 1)
    with pytest.raises(UserError, match="all experts are off at a place"):
        sample(core, strong(strong(model, "1", 0), "2", 0), prompt, prompt, noise)
    with pytest.raises(UserError, match="for 3 pictures, 2 are sampled"):
        sample(core, strong(model, "1", 0, mask=torch.ones(3, 64, 64)), prompt, prompt, noise)


def test_maps_are_those_of_the_sampling_that_made_the_latents(core, made, family):
    mine = made(family, placement="layers", aggregator="stitch")
    model = combine(family.models(core), mine)
    positive, negative, noise = family.prompt(1), family.prompt(2), family.noise(2, 16, 12)
    latents = sample(core, model, positive, negative, noise)
    other = sample(core, strong(model, "1", 0), positive, negative, noise)
    nodes, shares = AfaWeights(), []
    for one in (latents, other):
        maps, overlay, told = nodes.show(model, {"samples": one}, "all")
        assert maps.shape == (4, 128, 96, 3) and overlay.shape == (2, 128, 96, 3)
        assert maps.min() >= 0 and maps.max() <= 1
        shares.append([float(line.split()[1]) for line in told.splitlines()])
        assert sum(shares[-1]) == pytest.approx(1, abs=2e-3)
    assert shares[1] == [0, 1] != shares[0]  # of weights that are almost 0, too, all is the other's
    stage = {"flux": "D00", "chroma": "D00", "sd3": "J00"}.get(family.name, "M00")
    picture = torch.rand(2, 64, 48, 3)
    maps, overlay, _ = nodes.show(model, {"samples": latents}, stage, picture)
    assert maps.shape == (4, 64, 48, 3) and overlay.shape == (2, 64, 48, 3)
    with pytest.raises(UserError, match="none of the last 4 samplings"):
        nodes.show(model, {"samples": latents + 1}, "all")
    with pytest.raises(UserError, match="no stage with weights 'M77'"):
        nodes.show(model, {"samples": latents}, "M77")
    with pytest.raises(UserError, match="3 pictures for the weights of 2"):
        nodes.show(model, {"samples": latents}, "all", torch.rand(3, 64, 48, 3))


# --- what does not fit ---


def test_experts_that_do_not_fit_are_refused_in_a_sentence(core, made, tmp_path):
    sd, xl, flux = (FAMILIES[name] for name in ("sd15", "sdxl", "flux"))
    mine = made(sd)
    models = sd.models(core)
    for given, told in (
        ([*models, models[0]], "ensemble of 2 experts, 3 MODELs are connected; connect, in this order, expert_0, expert_1"),
        ([models[0], xl.model(core, 0)], "MODEL 2 .expert_1. "),
        ([models[0], flux.model(core, 0)], "MODEL 2 .expert_1. is of family flux, .* is an ensemble of family unet"),
        ([models[0], unet_model(core, sd_unet(1, **SD15 | {"block_out_channels": (32, 96)}))], "MODEL 2 .* has 96 channels at stage .*expects 64"),
        ([models[0], unet_model(core, sd_unet(1, **SD15 | {"layers_per_block": 2}))], "MODEL 2 .*stage"),
        ([models[0], unet_model(core, sd_unet(1, **SD15 | {"cross_attention_dim": 48}))], "reads text of width 48, .* of width 24"),
        ([models[0], unet_model(core, sd_unet(1, **SD20), "SD20")], "predict different things"),
    ):
        with pytest.raises(UserError, match=told):
            combine(given, mine)
    with pytest.raises(UserError, match="is no ensemble: it has no afa.json"):
        combine(models, tmp_path)
    other = family_of_another_kind(core)
    with pytest.raises(UserError, match="MODEL 1 .expert_0. is a NextDiT, .* served are Stable Diffusion"):
        combine([other, models[1]], mine)
    half = models[1].clone()
    half.set_model_compute_dtype(torch.float16)
    with pytest.raises(UserError, match=r"MODEL 2 .* computes in torch.float16, MODEL 1 .* in torch.float32"):
        combine([models[0], half], mine)
    with pytest.raises(UserError, match="needs pooled text|takes no pooled text"):
        model = combine([xl.model(core, 0, copy=1), xl.model(core, 1)], made(xl))
        model.model.encode_adm = lambda **kwargs: None  # of no other test: nobody else takes this copy
        sample(core, model, xl.prompt(1), xl.prompt(2), xl.noise())


def family_of_another_kind(core):
    class NextDiT(torch.nn.Module):
        """Stands where another architecture's network would."""

    cpu = torch.device("cpu")
    model = torch.nn.Module()
    model.diffusion_model = NextDiT()
    return core.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_reference_images_are_refused(core, made):
    family = FAMILIES["flux"]
    mine = made(family)
    model = combine(family.models(core), mine)
    prompt = family.prompt(1)
    prompt[0][1]["reference_latents"] = [torch.zeros(1, 16, 16, 16)]
    with pytest.raises(UserError, match="reference images"):
        sample(core, model, prompt, family.prompt(2), family.noise())


def test_the_files_that_were_loaded_are_compared_with_those_of_the_training(core, made, tmp_path, monkeypatch, caplog):
    import folder_paths

    family = FAMILIES["sd15"]
    files = {}
    (tmp_path / "checkpoints").mkdir()
    for name in ("photo", "paint", "other"):
        files[name] = tmp_path / "checkpoints" / f"{name}.safetensors"
        files[name].write_bytes(name.encode() * 50)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path / "checkpoints")], {".safetensors"}))
    mine = shutil.copytree(made(family), tmp_path / "mine")
    manifest = json.loads((mine / "afa.json").read_text())
    for entry, name in zip(manifest["experts"], ("photo", "paint"), strict=True):
        entry["files"] = {f"{name}.safetensors": sha256(files[name])}
    (mine / "afa.json").write_text(json.dumps(manifest))

    def prompt(*names, lora=False):
        loaders = [{"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{name}.safetensors"}} for name in names]
        nodes = {str(place): loader for place, loader in enumerate(loaders, start=1)}
        nodes["5"] = {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["1", 0]}}
        nodes["9"] = {"class_type": "AfaEnsemble", "inputs": {"model_1": ["5" if lora else "1", 0], "model_2": ["2", 0]}}
        return nodes

    models = family.models(core)
    given = dict(zip(("model_1", "model_2"), models, strict=True))
    node = AfaEnsemble()
    with caplog.at_level(logging.WARNING, "afa"):
        _, told = node.combine("(by path)", str(mine), prompt=prompt("photo", "paint"), unique_id="9", **given)
        assert told.splitlines() == ["1 expert_0: photo.safetensors, the file of the training", "2 expert_1: paint.safetensors, the file of the training"]
        assert caplog.text == ""
        _, told = node.combine("(by path)", str(mine), prompt=prompt("photo", "other"), unique_id="9", **given)
        assert f"MODEL 2 (expert_1): other.safetensors has sha256 {sha256(files['other'])}" in caplog.text
        assert f"made with {sha256(files['paint'])}" in told
        provenance(prompt("photo", "paint", lora=True), "9", ["model_1", "model_2"], mine, folder_paths)
        assert "1 LoRAs are on photo.safetensors, the ensemble was made with 0" in caplog.text
    with pytest.raises(UserError, match="MODEL 1 is expert 'expert_1' .paint.safetensors., expected 'expert_0'"):
        node.combine("(by path)", str(mine), prompt=prompt("paint", "photo"), unique_id="9", **given)
    unknown = {"9": {"inputs": {"model_1": ["7", 0], "model_2": ["9", 0]}}}
    told = provenance(unknown, "9", ["model_1", "model_2"], mine, folder_paths)
    assert all("not compared" in line for line in told)
    node.combine("(by path)", str(mine), compare_files=False, prompt=prompt("paint", "photo"), unique_id="9", **given)


def test_ensembles_are_found_in_comfyuis_folder_of_models(core, made, tmp_path, monkeypatch):
    import folder_paths

    from afa.comfyui.nodes import ensembles

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "afa", ([str(tmp_path / "models")], set()))
    shutil.copytree(made(FAMILIES["sd15"]), tmp_path / "models" / "mine")
    (tmp_path / "models" / "nothing").mkdir()
    assert ensembles() == {"mine": Path(tmp_path / "models" / "mine")}
    assert AfaEnsemble.INPUT_TYPES()["required"]["ensemble"][0] == ["(by path)", "mine"]
    # a name is a path, too, as in the shipped workflow
    for chosen in (("mine", ""), ("(by path)", "mine"), ("(by path)", str(tmp_path / "models" / "mine"))):
        assert AfaEnsemble.VALIDATE_INPUTS(*chosen) is True
    assert combine(FAMILIES["sd15"].models(core), tmp_path / "models" / "mine")
    before = AfaEnsemble.IS_CHANGED("(by path)", "mine", model_1=None)
    assert before.startswith("{") and AfaEnsemble.IS_CHANGED("gone") == ""
    with pytest.raises(UserError, match="no ensemble in models/afa 'min'; did you mean 'mine'"):
        AfaEnsemble().combine("min")


def checkpoint(core, family, seed, path):
    """A single file of a U-Net and ComfyUI's tiny CLIP, as CheckpointLoaderSimple reads it."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(family.pipeline(seed).unet).items()}
    for name, tensor in tiny_clip(core, seed).cond_stage_model.state_dict().items():
        tensors[name.replace("clip_l.", "cond_stage_model.")] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_the_example_runs_in_comfyuis_executor(core, made, tmp_path, monkeypatch):
    """The shipped workflow, without the VAE (ComfyUI's has one size alone), from files to maps, by the server's own executor."""
    import asyncio

    import execution
    import folder_paths
    import nodes
    from comfy import sd1_clip, supported_models, supported_models_base

    from afa.comfyui import nodes as ours

    class TinyCLIP(sd1_clip.SD1ClipModel):
        def __init__(self, model_options, **settings):
            super().__init__(model_options={**model_options, "clip_l_model_config": CLIP_SHAPE}, **settings)

    class TinySD15(supported_models.SD15):
        unet_config = supported_models.SD15.unet_config | {"context_dim": 24, "model_channels": 32}

        def clip_target(self, state_dict):
            return supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, TinyCLIP)

    monkeypatch.setattr(supported_models, "models", [TinySD15, *supported_models.models])
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", nodes.NODE_CLASS_MAPPINGS | ours.NODE_CLASS_MAPPINGS)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path / "checkpoints")], {".safetensors"}))
    family = FAMILIES["sd15"]
    files = [checkpoint(core, family, seed, tmp_path / "checkpoints" / f"{name}.safetensors") for seed, name in enumerate(("photo", "paint"))]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "afa", ([str(tmp_path / "ensembles")], set()))
    mine = shutil.copytree(made(family, placement="layers"), tmp_path / "ensembles" / "my-ensemble")
    manifest = json.loads((mine / "afa.json").read_text())
    for entry, file in zip(manifest["experts"], files, strict=True):
        entry["files"] = {file.name: sha256(file)}
    (mine / "afa.json").write_text(json.dumps(manifest))

    prompt = json.loads((PACK / "api" / "afa_two_experts.json").read_text())
    kinds = {node["class_type"] for node in prompt.values()}
    assert kinds <= set(nodes.NODE_CLASS_MAPPINGS)
    for name in [name for name, node in prompt.items() if node["class_type"] in ("VAEDecode", "SaveImage")]:
        del prompt[name]
    del prompt["11"]["inputs"]["image"]
    assert prompt["3"]["inputs"]["path"] == mine.name
    prompt["7"]["inputs"] |= {"width": 128, "height": 64}
    prompt["8"]["inputs"]["steps"] = 2
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *args: None)
    takes = inspect.signature(execution.PromptExecutor).parameters
    executor = execution.PromptExecutor(server, **({"cache_args": {"lru": 0, "ram": 0, "ram_inactive": 0}} if "cache_args" in takes else {}))

    prompt["3"]["inputs"]["path"] = "my-ensembel"
    _, _, _, errors = asyncio.run(execution.validate_prompt("one", prompt, None))
    assert "no ensemble 'my-ensembel' in models/afa" in errors["3"]["errors"][0]["details"]
    prompt["3"]["inputs"]["path"] = mine.name

    def run():
        valid, error, outputs, errors = asyncio.run(execution.validate_prompt("one", prompt, None))
        assert valid, (error, errors)
        executor.execute(prompt, "one", {}, outputs)
        return sorted(path.name for path in (tmp_path / "temp").glob("*.png")), executor.status_messages

    pictures, messages = run()
    assert executor.success, messages
    assert len(pictures) == 3  # a map for each expert, and both over the picture
    prompt["4"]["inputs"]["expert"] = "paint"
    _, messages = run()
    assert not executor.success
    told = next(data for event, data in messages if event == "execution_error")
    assert told["node_id"] == "4" and "there is no expert of this ensemble 'paint'" in told["exception_message"]
    prompt["4"]["inputs"]["expert"] = "expert_1"
    prompt["3"]["inputs"]["model_1"], prompt["3"]["inputs"]["model_2"] = ["2", 0], ["1", 0]
    _, messages = run()
    told = next(data for event, data in messages if event == "execution_error")
    assert "MODEL 1 is expert 'expert_1'" in told["exception_message"]
