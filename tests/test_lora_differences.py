"""LoHa, LoKr, DoRA and whole differences become part of an expert's weights, by their published formulas; in merges, too."""

import functools

import pytest
import torch
from safetensors.torch import save_file
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import FLUX_SMALL, flux_pipeline

from afa import Ensemble, UserError
from afa.experts.load import load_expert, load_experts
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "mid_block.resnets.0.conv1"
KOHYA = {LINEAR: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", CONV: "lora_unet_mid_block_resnets_0_conv1"}
NORM = torch.linalg.vector_norm


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    sd_pipeline(0, **ONE_LEVEL).save_pretrained(root / "sd")
    flux_pipeline(0, **FLUX_SMALL).save_pretrained(root / "flux")
    return root


def weights(home, place, name, part="model"):
    return (base_state if place in (str(home / "sd"), str(home / "flux")) else state_of)(place, part)[name]


def state_of(place, part):
    expert = load_expert(place)
    return (expert.model if part == "model" else expert.text_encoders[0]).state_dict()


base_state = functools.cache(state_of)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def loha(out, columns, kernel=(), cores=False):
    own = {}
    width = columns if cores else columns * max(1, torch.Size(kernel).numel())
    for one in "12":
        own |= {f"hada_w{one}_a": random(*((3, out) if cores else (out, 3))), f"hada_w{one}_b": random(3, width)}
        own |= {f"hada_t{one}": random(3, 3, *kernel)} if cores else {}
    factors = [
        torch.einsum("abkl,bi,ao->oikl", own[f"hada_t{one}"], own[f"hada_w{one}_b"], own[f"hada_w{one}_a"])
        if cores
        else (own[f"hada_w{one}_a"] @ own[f"hada_w{one}_b"]).reshape(out, columns, *kernel)
        for one in "12"
    ]
    return own | {"alpha": torch.tensor(2.0)}, factors[0] * factors[1] * 2 / 3


def lokr(out, columns, kernel=(), kind="both"):
    """kind: which factors are products, or the core's"""
    whole = {"w1": random(2, 4), "w2": random(out // 2, columns // 4, *kernel)}
    own = {f"lokr_{name}": tensor for name, tensor in whole.items()}
    scale = 1.0
    if kind == "first":
        own |= {"lokr_w1_a": random(2, 3), "lokr_w1_b": random(3, 4)}
        whole["w1"] = own["lokr_w1_a"] @ own["lokr_w1_b"]
        del own["lokr_w1"]
    if kind == "second":
        own |= {"lokr_w2_a": random(out // 2, 3), "lokr_w2_b": random(3, columns // 4 * max(1, torch.Size(kernel).numel()))}
        whole["w2"] = (own["lokr_w2_a"] @ own["lokr_w2_b"]).reshape(whole["w2"].shape)
        del own["lokr_w2"]
    if kind == "core":
        own |= {"lokr_t2": random(3, 3, *kernel), "lokr_w2_a": random(3, out // 2), "lokr_w2_b": random(3, columns // 4)}
        whole["w2"] = torch.einsum("abkl,bi,ao->oikl", own["lokr_t2"], own["lokr_w2_b"], own["lokr_w2_a"])
        del own["lokr_w2"]
    if kind != "both":
        scale = 2 / 3
    blocks = torch.einsum("ab,cd...->acbd...", whole["w1"], whole["w2"])
    return own | {"alpha": torch.tensor(2.0)}, blocks.reshape(out, columns, *kernel) * scale


def lora(out, columns, kernel=(), mid=False):
    up, down = random(out, 3, *([1, 1] if kernel else [])), random(3, columns, *([1, 1] if mid else kernel))
    own = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    if mid:
        own["lora_mid.weight"] = random(3, 3, *kernel)
        return own, torch.einsum("or,rskl,si->oikl", up.flatten(1), own["lora_mid.weight"], down.flatten(1)) * 2 / 3
    return own, (up.flatten(1) @ down.flatten(1)).reshape(out, columns, *kernel) * 2 / 3


def whole(out, columns, kernel=()):
    difference = random(out, columns, *kernel)
    return {"diff": difference}, difference


CASES = {
    "LoHa": (LINEAR, loha, {}),
    "LoHa of a convolution": (CONV, loha, {}),
    "LoHa with cores": (CONV, loha, {"cores": True}),
    "LoKr": (LINEAR, lokr, {}),
    "LoKr, first factor": (LINEAR, lokr, {"kind": "first"}),
    "LoKr, second factor": (LINEAR, lokr, {"kind": "second"}),
    "LoKr of a convolution": (CONV, lokr, {}),
    "LoKr of a convolution, second factor": (CONV, lokr, {"kind": "second"}),
    "LoKr with a core": (CONV, lokr, {"kind": "core"}),
    "LoCon with a core": (CONV, lora, {"mid": True}),
    "whole": (LINEAR, whole, {}),
    "whole convolution": (CONV, whole, {}),
}


def write(path, layer, own):
    save_file({f"{layer}.{name}": tensor.contiguous() for name, tensor in own.items()}, path)
    return path


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_expert_and_a_merge_have_the_difference_by_its_formula(case, home, tmp_path):
    strength = 1.0 if case == "LoHa" else 0.5
    layer, make, how = CASES[case]
    base = str(home / "sd")
    before = weights(home, base, f"{layer}.weight")
    own, delta = make(before.shape[0], before.shape[1], tuple(before.shape[2:]), **how)
    expert = f"x={base}+{write(tmp_path / 'x.safetensors', KOHYA[layer], own)}*{strength}"
    found = weights(home, expert, f"{layer}.weight")
    assert close(found, before + strength * delta) and delta.abs().max() > 0.01
    merge_files(MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / "merged")))
    assert torch.equal(weights(home, str(tmp_path / "merged"), f"{layer}.weight"), found)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("layer", "make", "strength"), [(LINEAR, lora, 1.0), (CONV, lora, 0.5), (LINEAR, loha, 0.5), (LINEAR, lokr, 0.5)])
def test_a_dora_has_the_magnitudes_of_its_rows_or_columns(layer, make, columns, strength, home, tmp_path):
    base = str(home / "sd")
    before = weights(home, base, f"{layer}.weight")
    own, delta = make(before.shape[0], before.shape[1], tuple(before.shape[2:]))
    shape = [1] * before.ndim
    shape[columns] = before.shape[columns]
    own["dora_scale"] = random(*shape).abs() + 0.1
    expert = f"x={base}+{write(tmp_path / 'x.safetensors', KOHYA[layer], own)}*{strength}"
    norms = NORM(before + delta, dim=[place for place in range(before.ndim) if place != columns], keepdim=True)
    changed = own["dora_scale"] * (before + delta) / norms
    found = weights(home, expert, f"{layer}.weight")
    assert close(found, before + strength * (changed - before))
    merge_files(MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / "merged")))
    assert torch.equal(weights(home, str(tmp_path / "merged"), f"{layer}.weight"), found)


def test_a_bias_and_a_text_encoder_change_as_well(home, tmp_path):
    base, text = str(home / "sd"), "encoder.layers.0.mlp.fc1"
    bias = weights(home, base, f"{CONV}.bias")
    before = weights(home, base, f"{text}.weight", "text")
    own = {f"{KOHYA[CONV]}.diff_b": random(len(bias)), f"lora_te_text_model_{text.replace('.', '_')}.diff": random(*before.shape)}
    save_file(own, tmp_path / "x.safetensors")
    expert = f"x={base}+{tmp_path / 'x.safetensors'}"
    merge_files(MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / "merged")))
    for place in (expert, str(tmp_path / "merged")):
        assert close(weights(home, place, f"{CONV}.bias"), bias + random(len(bias)))
        assert close(weights(home, place, f"{text}.weight", "text"), before + random(*before.shape))


def test_layers_that_the_publisher_has_as_one_get_their_rows(home, tmp_path):
    """FLUX.1's qkv, and its last modulation, whose halves stand the other way round in diffusers."""
    base = str(home / "flux")
    names = [f"transformer_blocks.0.attn.to_{letter}.weight" for letter in "qkv"]
    before = torch.cat([weights(home, base, name) for name in names])
    own, delta = loha(*before.shape)
    last = weights(home, base, "norm_out.linear.weight")
    other, turned = lokr(*last.shape, kind="second")
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": tensor for name, tensor in own.items()}
    tensors |= {f"lora_unet_final_layer_adaLN_modulation_1.{name}": tensor for name, tensor in other.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    expert = f"x={base}+{tmp_path / 'x.safetensors'}"
    merge_files(MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / "merged")))
    for place in (expert, str(tmp_path / "merged")):
        assert close(torch.cat([weights(home, place, name) for name in names]), before + delta)
        assert close(weights(home, place, "norm_out.linear.weight"), last + torch.cat(turned.chunk(2)[::-1]))


@pytest.mark.parametrize("columns", [False, True])
def test_a_dora_of_layers_that_are_one_takes_its_norms_over_all_of_them(columns, home, tmp_path):
    base = str(home / "flux")
    names = [f"transformer_blocks.0.attn.to_{letter}.weight" for letter in "qkv"]
    before = torch.cat([weights(home, base, name) for name in names])
    own, delta = lora(*before.shape)
    own["dora_scale"] = random(*((1, before.shape[1]) if columns else (before.shape[0], 1))).abs() + 0.1
    expert = f"x={base}+{write(tmp_path / 'x.safetensors', 'lora_unet_double_blocks_0_img_attn_qkv', own)}"
    wanted = own["dora_scale"] * (before + delta) / NORM(before + delta, dim=0 if columns else 1, keepdim=True)
    assert close(torch.cat([weights(home, expert, name) for name in names]), wanted)
    settings = MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / "merged"))
    if columns:
        with pytest.raises(UserError, match="norms over 3 layers"):
            merge_files(settings)
    else:
        merge_files(settings)
        assert close(torch.cat([weights(home, str(tmp_path / "merged"), name) for name in names]), wanted)


def test_files_join_in_their_order_with_plain_loras_among_them(home, tmp_path):
    base = str(home / "sd")
    before = weights(home, base, f"{LINEAR}.weight")
    one, first = lora(*before.shape)
    two, second = loha(*before.shape)
    files = [write(tmp_path / "one.safetensors", KOHYA[LINEAR], one), write(tmp_path / "two.safetensors", KOHYA[LINEAR], two)]
    for order in (files, files[::-1]):
        expert = f"x={base}+{order[0]}+{order[1]}"
        assert close(weights(home, expert, f"{LINEAR}.weight"), before + first + second)
        merge_files(MergeSettings([expert, expert.replace("x=", "y=")], str(tmp_path / order[0].stem)))
        assert close(weights(home, str(tmp_path / order[0].stem), f"{LINEAR}.weight"), before + first + second)


def test_experts_on_one_base_stay_apart_and_an_ensemble_finds_them_again(home, tmp_path):
    base = str(home / "sd")
    before = weights(home, base, f"{LINEAR}.weight")
    own, delta = loha(*before.shape)
    file = write(tmp_path / "x.safetensors", KOHYA[LINEAR], own)
    plain, changed = load_experts([f"a={base}", f"b={base}+{file}"])
    assert torch.equal(plain.model.state_dict()[f"{LINEAR}.weight"], before)
    assert close(changed.model.state_dict()[f"{LINEAR}.weight"], before + delta)
    ensemble = Ensemble.from_experts([f"a={base}", f"b={base}+{file}"], aggregator="mean")
    ensemble.save(tmp_path / "saved")
    again = Ensemble.load(tmp_path / "saved").experts[1].model
    assert torch.equal(again.state_dict()[f"{LINEAR}.weight"], changed.model.state_dict()[f"{LINEAR}.weight"])


BROKEN = {
    "a factor is missing": ({"hada_w1_a": random(16, 3)}, "lacks hada_w1_b"),
    "half of a LoKr": ({"lokr_w1": random(2, 4)}, "lacks lokr_w2"),
    "half of a product": ({"lokr_w1": random(2, 4), "lokr_w2_a": random(8, 2)}, "lacks lokr_w2"),
    "shapes that do not fit each other": (loha(16, 24)[0] | {"hada_w1_b": random(2, 24)}, "does not make"),
    "another size": ({"diff": random(8, 8)}, "does not make"),
    "turned": ({"diff": random(24, 16)}, "does not make"),
    "a bias that the layer has not": ({"diff_b": random(16)}, "diff_b"),
    "a magnitude of another size": ({"dora_scale": random(1, 7)}, "dora_scale"),
    "an alpha that is no number": ({"diff": random(16, 24), "alpha": torch.tensor(float("nan"))}, "alpha|finite"),
    "something else": ({"diff": random(16, 24), "set_weight": random(2)}, "no place"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_incomplete_or_does_not_fit_is_one_sentence(case, home, tmp_path):
    tensors, sentence = BROKEN[case]
    file = write(tmp_path / "x.safetensors", KOHYA[LINEAR], tensors)
    experts = [f"{name}={home / 'sd'}+{file}" for name in "xy"]
    for read in (lambda: load_expert(experts[0]), lambda: merge_files(MergeSettings(experts, str(tmp_path / "m")))):
        with pytest.raises(UserError, match=sentence) as refused:
            read()
        assert "\n" not in str(refused.value) and "x.safetensors" in str(refused.value)


def test_a_file_of_another_architecture_is_one_sentence(home, tmp_path):
    file = write(tmp_path / "x.safetensors", "lora_unet_nowhere", {"diff": random(4, 4)})
    with pytest.raises(UserError, match="lora_unet_nowhere.diff found no place"):
        load_expert(f"{home / 'sd'}+{file}")
