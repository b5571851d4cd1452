"""Odd LoRA files are refused by name and with the true reason, before anything of a model is changed."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny import sd_unet, text_encoder

from afa import UserError
from afa.denoiser.lora import adapter_parameters, check_weights
from afa.experts.lora import load_lora
from afa.experts.spec import ExpertSpec, Lora

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4} | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"  # 24 -> 16
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def plain(layer=LAYER, columns=24, rows=16, rank=2, value=0.1):
    return {f"{layer}.lora_down.weight": torch.full((rank, columns), value), f"{layer}.lora_up.weight": torch.full((rows, rank), value)}


@pytest.fixture(scope="module")
def parts():
    return {"unet": sd_unet(0, **SMALL), "text_encoder": text_encoder(0, width=24)}


def refused(parts, tmp_path, tensors, *words, name="odd.safetensors"):
    """The sentence with which a file is refused; it names the file, and nothing of it stays in the models."""
    if tensors is not None:
        save_file(tensors, tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_lora(parts, tmp_path / name, "own_0", "expert 'x'")
    sentence = str(caught.value)
    assert name in sentence and "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not any(adapter_parameters(module, "own_0") for module in parts.values())
    return sentence


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w2", "LoKr"),
        ("dora_scale", "DoRA"),
        ("lora_mid.weight", "core tensor"),
        ("oft_blocks", "OFT"),
        ("oft_diag", "OFT"),
        ("on_input", "IA3"),
        ("diff", "full difference"),
        ("diff_b", "full difference"),
        ("w_norm", "full difference"),
        ("a1.weight", "GLoRA"),
        ("lora_down.weight_scale", "quantised"),
    ],
)
def test_other_kinds_are_named_alone_and_among_plain_layers(parts, tmp_path, key, kind):
    for more in ({}, plain()):
        refused(parts, tmp_path, {f"lora_unet_mid_block_attentions_0_proj_in.{key}": torch.zeros(2, 2), **more}, kind, key)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, ("empty",)),
        ({"bundle_emb.cat.string_to_param.*": torch.zeros(1, 24), **plain()}, ("embedding", "bundle_emb")),
        ({"emb_params": torch.zeros(1, 24)}, ("embedding",)),
        ({"model.diffusion_model.out.2.weight": torch.zeros(4, 4, 3, 3)}, ("whole checkpoint",)),
        ({"decoder.conv_in.weight": torch.zeros(4, 4)}, ("no LoRA", "decoder.conv_in.weight")),
        ({"step": torch.zeros(1), **plain()}, ("step", "besides")),
        ({f"{LAYER}.alpha": torch.tensor(2.0)}, ("incomplete", LAYER)),
        ({key: tensor for key, tensor in plain().items() if "up" in key}, ("incomplete", "lora_down")),
        ({key: tensor for key, tensor in plain().items() if "down" in key}, ("incomplete", "lora_up")),
        ({key: tensor.to(torch.int8) for key, tensor in plain().items()}, ("quantised", "lora_down")),
        (plain("lora_unet_mid_block_nowhere"), ("2 of its 2 weights", "first: lora_unet_mid_block_nowhere")),
        ({**plain(), **plain("lora_unet_nowhere")}, ("2 of its 4 weights", "first: lora_unet_nowhere")),
        ({**plain(), **plain("lora_te2_text_model_encoder_layers_0_mlp_fc1")}, ("2 of its 4 weights", "lora_te2")),
        (plain("lora_unet_mid_block_resnets_0_norm1"), ("2 of its 2 weights", "norm1")),
        (plain(columns=32), ("(2, 32)", "(rank, 24)")),
        (plain(rows=17), ("(17, 2)", "(16, rank)")),
        ({**plain(rank=3), f"{LAYER}.lora_up.weight": torch.zeros(16, 2)}, ("(3, 24)", "(16, 2)", "rank")),
        (plain(rank=0), ("(0, 24)",)),
        (plain("lora_unet_conv_in", columns=4, rows=8), ("(rank, 4, 3, 3)",)),
        (plain(value=float("nan")), ("finite", LAYER)),
        (plain(value=float("-inf")), ("finite", LAYER)),
        ({**plain(), f"{LAYER}.alpha": torch.tensor(float("nan"))}, ("alpha", "finite")),
        ({**plain(), f"{LAYER}.alpha": torch.tensor(float("inf"))}, ("alpha", "finite")),
        ({**plain(), f"{LAYER}.alpha": torch.tensor([1.0, 2.0])}, ("alpha", "(2,)")),
        ({**plain(), **plain(LAYER.replace("lora_unet_", "lora_transformer_"))}, ("twice",)),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_with_the_true_reason(parts, tmp_path, tensors, words):
    refused(parts, tmp_path, {key: tensor.contiguous() for key, tensor in tensors.items()}, *words)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"[]", b"\x80\x04K\x01."],
    ids=["nothing", "three bytes", "huge header", "list", "pickle"],
)
def test_broken_files_are_refused_by_name(parts, tmp_path, content):
    (tmp_path / "odd.safetensors").write_bytes(content)
    refused(parts, tmp_path, None)


def test_a_pickle_is_never_opened(parts, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").mkdir, ())

    torch.save({"x": Harm()}, tmp_path / "odd.pt")
    refused(parts, tmp_path, None, "safetensors", name="odd.pt")
    assert not (tmp_path / "harm").exists()


def test_values_that_do_not_fit_the_models_type_are_refused(tmp_path):
    half = {"unet": sd_unet(0, **SMALL).half()}
    refused(half, tmp_path, {**plain(value=6e4), f"{LAYER}.alpha": torch.tensor(1e4)}, "float16", "float32")


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        json.dumps({"lora_alpha": "many"}),
        json.dumps({"lora_alpha": [1]}),
        json.dumps({"peft_type": "LOHA", "lora_alpha": 1}),
        json.dumps({"init_lora_weights": "pissa_niter_4"}),
        '{"lora_alpha": NaN}',
        json.dumps({"lora_alpha": 1, "alpha_pattern": [1]}),
    ],
)
def test_settings_beside_a_lora_that_cannot_be_followed_are_refused(parts, tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    save_file(plain(), tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd\.safetensors|adapter_config\.json"):
        load_lora(parts, tmp_path / "odd.safetensors", "own_0", "expert 'x'")


@pytest.mark.parametrize("key", [TE, "lora_te_text_model_encoder_layers_1_mlp_fc2"])
def test_a_text_encoder_may_have_a_lora_on_any_one_layer(key, tmp_path):
    encoder = text_encoder(0, width=24)
    columns = 48 if "fc2" in key else 24
    save_file(plain(key, columns=columns, rows=24), tmp_path / "text.safetensors")
    load_lora({"unet": sd_unet(0, **SMALL), "text_encoder": encoder}, tmp_path / "text.safetensors", "own_0", "x")
    assert adapter_parameters(encoder, "own_0")


def test_an_alpha_of_zero_is_said_on_stderr(tmp_path, capsys):
    save_file({**plain(), f"{LAYER}.alpha": torch.tensor(0)}, tmp_path / "zero.safetensors")
    load_lora({"unet": sd_unet(0, **SMALL)}, tmp_path / "zero.safetensors", "own_0", "x")
    assert "alpha is 0 in 1 layer" in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_that_is_no_finite_number_is_refused(strength):
    with pytest.raises(UserError, match="strength"):
        ExpertSpec.parse(f"x=base+style.safetensors*{strength}")
    with pytest.raises(UserError, match="strength"):
        Lora("style.safetensors", float(strength))
    for weights in (float(strength), [1.0, float(strength)], {"down": {"block_1": [float(strength)]}}):
        with pytest.raises(UserError, match="weight of a LoRA"):
            check_weights(weights)


def test_a_plus_or_a_star_in_a_files_name_belongs_to_it(tmp_path):
    base, odd = tmp_path / "a+b", tmp_path / "style+v2*3.safetensors"
    base.mkdir()
    odd.touch()
    (tmp_path / "plain.safetensors").touch()
    spec = ExpertSpec.parse(f"x={base}+{odd}+{tmp_path / 'plain.safetensors'}*0.5+{odd}*-2")
    assert spec.source == str(base)
    assert [(lora.path, lora.strength) for lora in spec.loras] == [
        (str(odd), 1.0),
        (str(tmp_path / "plain.safetensors"), 0.5),
        (str(odd), -2.0),
    ]
    assert ExpertSpec.parse("org/name@main+style.safetensors").source == "org/name"
