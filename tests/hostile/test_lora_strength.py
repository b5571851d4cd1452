"""Every layer of a LoRA counts alpha / rank of its own, whatever names it is written in, on whichever way it is loaded.

Held against weights to which strength · alpha / rank · up @ down was added by hand.
"""

import functools
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_transformers import originals
from safetensors.torch import save_file
from tiny import scheduler, sd_unet, sdxl_unet, text_encoder, tokenizer, vae
from tiny_transformers import flux_transformer, sd3_transformer

from afa import Ensemble
from afa.denoiser.lora import adapter_parameters, tuner_layers
from afa.experts.load import load_expert
from afa.experts.lora import fuse, load_lora
from afa.models.registry import stages_of
from afa.stages.original_names import unet_names

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4} | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# layer -> rank, alpha; None: no alpha in the file. Alphas of every size, and ranks that differ
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (4, 4.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (2, 1.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (3, 0.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (4, None),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (1, 5.0),
    "down_blocks.0.attentions.0.proj_in": (2, 2.0),
    "mid_block.resnets.1.conv1": (3, 1.0),
    "mid_block.resnets.0.time_emb_proj": (2, -1.0),
    "up_blocks.0.upsamplers.0.conv": (2, 4.0),
    "conv_in": (2, 1.0),
    "time_embedding.linear_2": (1, 0.5),
}
TEXT = {"encoder.layers.0.self_attn.q_proj": (2, 1.0), "encoder.layers.1.mlp.fc1": (3, 3.0)}


def parts(kind="sd"):
    if kind == "sd":
        return {"unet": sd_unet(0, **SMALL), "text_encoder": text_encoder(0, width=24)}
    return {"unet": sdxl_unet(0)}


def layer_of(module, name):
    found = dict(module.named_modules())
    return name if name in found else f"text_model.{name}"


def factors(module, name, rank, seed):
    """(up, down) for a layer, flat."""
    weight = module.get_submodule(layer_of(module, name)).weight
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((weight.shape[0], rank), (rank, weight[0].numel())))
    return up, down


def shaped(module, name, up, down):
    """The factors as files have them: convolutions keep their kernel in down."""
    weight = module.get_submodule(layer_of(module, name)).weight
    return (up[..., None, None], down.reshape(-1, *weight.shape[1:])) if weight.ndim == 4 else (up, down)


def by_hand(found, layers, strength=1.0):
    """The weights of some parts with the LoRA added: strength · alpha / rank · up @ down."""
    wanted = {part: {key: tensor.clone() for key, tensor in module.state_dict().items()} for part, module in found.items()}
    for part, module in found.items():
        for seed, (name, (rank, alpha)) in enumerate(layers.get(part, {}).items()):
            up, down = factors(module, name, rank, seed)
            weight = wanted[part][f"{layer_of(module, name)}.weight"]
            scale = strength * (alpha / rank if alpha is not None else 1.0)
            weight += (scale * up @ down).reshape(weight.shape)
    return wanted


def written(found, layers, key, names=("lora_down", "lora_up"), alphas=torch.tensor):
    """A file's tensors. key: (part, layer) -> its name there; names: of the factors; alphas: how one is stored."""
    tensors = {}
    for part, module in found.items():
        for seed, (name, (rank, alpha)) in enumerate(layers.get(part, {}).items()):
            up, down = shaped(module, name, *factors(module, name, rank, seed))
            tensors |= {f"{key(part, name)}.{names[0]}.weight": down, f"{key(part, name)}.{names[1]}.weight": up}
            if alpha is not None and alphas is not None:
                tensors[f"{key(part, name)}.alpha"] = alphas(alpha)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def same(found, wanted):
    for part, module in found.items():
        for key, tensor in module.state_dict().items():
            assert torch.allclose(tensor, wanted[part][key], rtol=1e-5, atol=1e-5), f"{part}.{key}"


def kohya(part, name):
    return {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + name.replace(".", "_")


def kohya_xl(part, name):
    return kohya(part, name).replace("lora_te_", "lora_te1_")


@functools.cache
def original_names():
    """The U-Net's weights that have a LoRA -> their names in LDM's layout."""
    names = [f"{layer}.weight" for layer in UNET]
    return unet_names(names, stages_of(names, sd_unet(0, **SMALL)))


def original(separator, prefix):
    """Names in LDM's layout."""

    def key(part, name):
        if part != "unet":
            return kohya(part, name)
        return prefix + original_names()[f"{name}.weight"].removesuffix(".weight").replace(".", separator)

    return key


DIALECTS = {
    "kohya": (kohya, ("lora_down", "lora_up")),
    "kohya of SDXL": (kohya_xl, ("lora_down", "lora_up")),
    "kohya, LDM's names": (original("_", "lora_unet_"), ("lora_down", "lora_up")),
    "ComfyUI": (original(".", "diffusion_model."), ("lora_A", "lora_B")),
    "ComfyUI, kohya's factors": (original(".", "diffusion_model."), ("lora_down", "lora_up")),
    "diffusers": (lambda part, name: f"{part}.{name}", ("lora.down", "lora.up")),
    "diffusers, text model": (lambda part, name: f"{part}.{'text_model.' if part != 'unet' else ''}{name}", ("lora_linear_layer.down", "lora_linear_layer.up")),
    "PEFT": (lambda part, name: f"base_model.model.{name}", ("lora_A", "lora_B")),
    "PEFT, with an adapter's name": (lambda part, name: f"base_model.model.{part}.{name}", ("lora_A.style", "lora_B.style")),
    "PEFT in diffusers": (lambda part, name: f"{part}.{name}", ("lora_A", "lora_B")),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_layer_counts_its_own_alpha_by_its_own_rank_in_every_dialect(dialect):
    key, names = DIALECTS[dialect]
    found, layers = parts(), {"unet": UNET, "text_encoder": TEXT}
    wanted = by_hand(found, layers)
    load_lora(found, written(found, layers, key, names), "own_0", "x")
    same({part: fuse(module) for part, module in found.items()}, wanted)


@pytest.mark.parametrize(
    "alphas",
    [
        lambda alpha: torch.tensor([alpha]),
        lambda alpha: torch.tensor(int(alpha)),
        lambda alpha: torch.tensor(alpha, dtype=torch.float16),
        lambda alpha: torch.tensor([[alpha]], dtype=torch.bfloat16),
        lambda alpha: torch.tensor(alpha, dtype=torch.float64),
    ],
    ids=["one element", "int64", "float16", "1 x 1 bfloat16", "float64"],
)
def test_an_alpha_is_the_same_however_it_is_stored(alphas):
    layers = {"unet": {name: (rank, int(alpha) if alpha is not None else None) for name, (rank, alpha) in UNET.items()}}
    found = parts()
    wanted = by_hand(found, layers)
    load_lora(found, written(found, layers, kohya, alphas=alphas), "own_0", "x")
    same({part: fuse(module) for part, module in found.items()}, wanted)


def test_a_linear_layer_may_be_written_as_a_convolution_and_the_reverse():
    found, layers = parts(), {"unet": UNET}
    wanted, tensors = by_hand(found, layers), written(found, layers, kohya)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "attn1" in name:
            tensors[name] = tensor[..., None, None]
        elif tensor.ndim == 4 and "proj_in" in name:
            tensors[name] = tensor[..., 0, 0].contiguous()
    load_lora(found, tensors, "own_0", "x")
    same({part: fuse(module) for part, module in found.items()}, wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_recorded_beside_the_tensors_count(tmp_path, rslora):
    """As PEFT does in adapter_config.json, and diffusers in the file's header."""
    own = dict(list(UNET.items())[:4])
    plain = {"unet": {name: (rank, None) for name, (rank, _) in own.items()}}
    first = next(iter(own))
    alphas = {name: 7.0 if name == first else 3.0 for name in own}
    effective = {name: alpha * (own[name][0] ** 0.5 if rslora else 1) for name, alpha in alphas.items()}
    wanted = by_hand(parts(), {"unet": {name: (rank, effective[name]) for name, (rank, _) in own.items()}})
    config = {"r": 4, "lora_alpha": 3, "alpha_pattern": {first: 7}, "use_rslora": rslora, "peft_type": "LORA"}

    (tmp_path / "peft").mkdir()
    peft = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(written(parts(), plain, lambda part, name: f"base_model.model.{name}", ("lora_A", "lora_B")), peft)
    peft.with_name("adapter_config.json").write_text(json.dumps(config))
    header = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    saved = tmp_path / "saved.safetensors"
    save_file(written(parts(), plain, lambda part, name: f"unet.{name}", ("lora_A", "lora_B")), saved, metadata=header)
    for file in (peft, peft.parent, saved):
        found = parts()
        load_lora(found, file, "own_0", "x")
        same({part: fuse(module) for part, module in found.items()}, wanted)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize("dialect", ["kohya", "ComfyUI"])
def test_a_transformers_original_layers_are_split_and_turned_as_their_weights_are(kind, dialect):
    """Of every original layer: joined q, k, v; halves that stand the other way round."""
    model = {"flux": flux_transformer, "sd3": sd3_transformer}[kind]()
    generator = torch.Generator().manual_seed(0)
    before = dict(originals(kind, model.state_dict()))
    tensors, wanted = {}, {}
    for number, (name, weight) in enumerate(before.items()):
        if not name.endswith(".weight") or weight.ndim not in (2, 4):
            continue
        rank, alpha = 1 + number % 3, 1.0 + number % 4
        up = torch.randn(weight.shape[0], rank, generator=generator)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        wanted[name] = weight + (alpha / rank * up @ down.flatten(1)).reshape(weight.shape)
        layer = name.removesuffix(".weight")
        key = f"lora_unet_{layer.replace('.', '_')}" if dialect == "kohya" else f"diffusion_model.{layer}"
        ends = ("lora_down", "lora_up") if dialect == "kohya" else ("lora_A", "lora_B")
        tensors |= {f"{key}.{ends[0]}.weight": down, f"{key}.{ends[1]}.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    load_lora({"transformer": model}, tensors, "own_0", "x")
    after = dict(originals(kind, fuse(model).state_dict()))
    for name, weight in before.items():
        assert torch.allclose(after[name], wanted.get(name, weight), rtol=1e-5, atol=1e-5), name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small whole pipeline, and a LoRA on it in kohya's names."""
    root = tmp_path_factory.mktemp("strength")
    found = parts()
    pipe = StableDiffusionPipeline(
        **found, tokenizer=tokenizer(), vae=vae(), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "base")
    save_file(written(found, {"unet": UNET, "text_encoder": TEXT}, kohya), root / "style+v2.safetensors")
    return root


def with_loras(module):
    """The weights of a model as it computes, with what lies beside them."""
    module = getattr(module, "module", module)
    state = {key.replace(".base_layer", ""): tensor for key, tensor in module.state_dict().items() if ".lora_" not in key}
    for name, layer in tuner_layers(module):
        state[f"{name}.weight"] = state[f"{name}.weight"] + sum(layer.get_delta_weight(one) for one in layer.active_adapters)
    return state


def differ(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one if one[key].is_floating_point())


def test_an_experts_own_lora_has_the_right_strength_in_its_weights_and_beside_them(base):
    """Also with a + in the file's name."""
    wanted = by_hand(parts(), {"unet": UNET, "text_encoder": TEXT}, 0.8)
    text = f"{base / 'base'}+{base / 'style+v2.safetensors'}*0.8"
    alone = load_expert(f"x={text}")
    same({"unet": alone.model, "text_encoder": alone.text_encoders[0]}, wanted)
    ensemble = Ensemble.from_experts([f"x={text}", f"y={base / 'base'}"], aggregator="mean")
    x, y = ensemble.denoiser.experts
    assert differ(with_loras(x), wanted["unet"]) < 1e-4
    assert differ(with_loras(y), parts()["unet"].state_dict()) == 0


@pytest.mark.parametrize("route", ["load_lora", "pipeline", "a pipeline of one's own", "tensors"])
def test_one_loaded_into_a_running_ensemble_has_the_right_strength(base, tmp_path, route):
    layers = {"unet": UNET, "text_encoder": TEXT} if route != "a pipeline of one's own" else {"unet": UNET}
    wanted, file = by_hand(parts(), layers), tmp_path / "style.safetensors"
    tensors = written(parts(), layers, kohya)
    save_file(tensors, file)
    ensemble = Ensemble.from_experts([f"x={base / 'base'}", f"y={base / 'base'}"], aggregator="mean")
    pipe = ensemble.pipeline()
    if route == "load_lora":
        ensemble.load_lora(file, adapter_name="style")
    elif route == "pipeline":
        pipe.load_lora_weights(str(file), adapter_name="style")
    elif route == "tensors":
        pipe.load_lora_weights(tensors, adapter_name="style")
    else:
        own = type(pipe)(**pipe.components, requires_safety_checker=False)
        own.load_lora_weights(str(file), adapter_name="style")
    for expert in ensemble.denoiser.experts:
        assert adapter_parameters(expert, "style")
        assert differ(with_loras(expert), wanted["unet"]) < 1e-4
    if route != "a pipeline of one's own":
        encoder = ensemble.text_encoders[0].encoders[0]
        assert differ(with_loras(encoder), wanted["text_encoder"]) < 1e-4
