"""Laws of frozen weights that take less room: the same model, but for the rounding, and the same gradients."""

import copy
from dataclasses import replace

import pytest
import torch
from test_training import aggregators, experts, images, settings  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, SMALL, sd_unet
from torch import nn

from afa import UserError
from afa.aggregators.registry import Recipe
from afa.cost import call_of
from afa.devices import LiveBytes
from afa.experts.quantised import STORES, kept_tensors, store_weights, stored_bytes
from afa.experts.stored_weights import Ahead, EightBits, FewBits, OnCPU
from afa.memory import sampling_memory
from afa.models.unet import UNetEnsemble
from afa.settings import RESIDENT
from afa.training.run import plan, train

ALONE = [store for store in STORES if not store.startswith("delta")]  # needs several experts
WIDE = SMALL | {"block_out_channels": (32, 64)}  # whose layers are large enough to be stored
LARGEST_ERROR = {"cpu": 0.0, "int8": 0.5 / 127, "fp8": 2.0**-4}  # of a channel's largest number, of each number


@pytest.mark.parametrize("store", ALONE)
def test_a_stored_weight_is_the_weight_but_for_the_rounding(store):
    torch.manual_seed(0)
    weight = torch.randn(8, 16, 3, 3) * torch.logspace(-3, 2, 8).view(8, 1, 1, 1)
    stored = OnCPU(weight) if store == "cpu" else EightBits(weight, store)
    error = (stored.fetch(weight) - weight).abs()
    scale = weight.abs() if store == "fp8" else weight.abs().amax((1, 2, 3), keepdim=True)
    assert (error <= LARGEST_ERROR[store] * scale * 1.001 + 1e-3 * weight.abs().amax((1, 2, 3), keepdim=True) * (store == "fp8")).all()


@pytest.mark.parametrize("store", ALONE)
@pytest.mark.parametrize("layer", [nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(32, 48, 3, groups=2)])
def test_a_stored_layer_is_a_plain_layer_with_that_weight_and_so_are_its_gradients(store, layer):
    layer = copy.deepcopy(layer).requires_grad_(False)
    stored = copy.deepcopy(layer)
    store_weights(stored, store)
    with torch.no_grad():
        layer.weight.copy_(stored.weight)
    shape = (3, 5, 64) if isinstance(layer, nn.Linear) else (3, 32, 9, 8)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [each(x) for each, x in zip((layer, stored), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    assert isinstance(stored, type(layer)) and stored_bytes(stored) < stored_bytes(layer)


def test_the_weight_that_followed_last_time_is_copied_while_this_one_is_used(monkeypatch):
    weights, ahead = [OnCPU(torch.randn(4, 4)) for _ in range(3)], Ahead()
    copied, copy = [], OnCPU.copy
    monkeypatch.setattr(OnCPU, "copy", lambda kept, like: copied.append(weights.index(kept)) or copy(kept, like))
    like = torch.empty(0)

    def pass_over(order, like=like):
        copied.clear()
        for place in order:
            assert torch.equal(ahead.fetch(weights[place], like), weights[place].values.to(like.dtype))
        return list(copied)

    there, back = [0, 1, 2], [2, 1, 0]
    assert pass_over(there) == [0, 1, 2]  # nothing is known yet
    for _ in range(2):  # then every weight is under way before it is needed, in both passes
        pass_over(back)
        pass_over(there)
    assert [*pass_over(back), *pass_over(there)] == [1, 0, 0, 1, 2, 2]
    assert pass_over(back, like.double())[0] == 2  # what was under way has another dtype


@pytest.mark.parametrize(("store", "share"), [("int8", 0.3), ("fp8", 0.3), ("cpu", 0.06)])
def test_a_stored_expert_takes_less_room_and_predicts_nearly_the_same(store, share):
    unet = sd_unet(0, **WIDE).requires_grad_(False)
    stored = copy.deepcopy(unet)
    store_weights(stored, store)
    assert stored_bytes(stored) < share * stored_bytes(unet)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        one, other = (model(sample, torch.tensor([10, 900]), text).sample for model in (unet, stored))
    error = (one - other).square().mean() / one.square().mean()
    assert error < {"cpu": 1e-10, "int8": 1e-3, "fp8": 5e-3}[store]


@pytest.mark.parametrize("shape", [(8, 256, 3, 3), (6, 2001)])  # the second fills no whole number of bytes
@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634**0.5), (2, 0.1188**0.5)])
def test_a_difference_in_few_bits_is_as_near_as_such_steps_can_be(shape, bits, error):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=rng)
    weight = base + torch.randn(shape, generator=rng) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    middle = EightBits(base, "int8")
    difference = weight - middle.fetch(base)
    stored = FewBits(weight, middle, bits)
    left = stored.fetch(weight) - weight
    by_channel = (left.flatten(1).square().sum(1) / difference.flatten(1).square().sum(1)).sqrt()
    assert by_channel.mean() == pytest.approx(error, rel=0.02)  # of a normal distribution, Max 1960
    assert stored.values.numel() == -(-weight.numel() * bits // 8)


def near(count, by=0.1, **changes):
    """Experts whose weights differ by a tenth, as fine-tunes of one base do."""
    base = sd_unet(0, **WIDE | changes).requires_grad_(False)
    made = [copy.deepcopy(base) for _ in range(count)]
    rng = torch.Generator().manual_seed(1)
    for expert in made:
        for parameter in expert.parameters():
            parameter += by * parameter.std(correction=0) * torch.randn(parameter.shape, generator=rng)
    return nn.ModuleList(made)


@pytest.mark.parametrize(("store", "room", "left"), [("delta1", 0.6, 0.5), ("delta2", 0.75, 0.2)])
def test_near_experts_in_few_bits_take_less_room_than_in_eight_and_are_nearer_than_their_mean(store, room, left):
    plain = near(3)
    stored, eight = copy.deepcopy(plain), copy.deepcopy(plain)
    store_weights(stored, store)
    store_weights(eight, "int8")
    assert stored_bytes(stored) < room * stored_bytes(eight)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, plain[0].config.cross_attention_dim)
    mean = copy.deepcopy(plain[0])
    for target, *parameters in zip(mean.parameters(), *(expert.parameters() for expert in plain), strict=True):
        target.copy_(torch.stack(parameters).mean(0))

    def error(model, expert):
        one, other = (each(sample, torch.tensor([10, 900]), text).sample for each in (model, expert))
        return ((one - other).square().mean() / other.square().mean()).item()

    with torch.no_grad():
        for model, expert in zip(stored, plain, strict=True):
            assert error(model, expert) < left * error(mean, expert)


@pytest.mark.parametrize(("by", "warned"), [(0.05, False), (0.5, True)])
def test_experts_that_are_far_from_each_other_are_warned_of(by, warned, capsys):
    store_weights(near(2, by), "delta2")
    assert ("--store int8 is safe" in capsys.readouterr().err) == warned


def test_experts_in_one_bit_keep_one_middle_wherever_they_are_moved_or_cast():
    models = near(2)
    store_weights(models, "delta1")
    before = stored_bytes(models)
    models.to(torch.device("cpu")).to(torch.bfloat16)
    assert stored_bytes(models) < before  # what is stored stays, the small layers are cast
    one, other = (expert.mid_block.resnets[0].conv1 for expert in models)
    assert one.kept.middle is other.kept.middle and one.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("models", [near(1), nn.ModuleList([*near(1), sd_unet(0, **WIDE | {"block_out_channels": (32, 32)})])])
def test_differences_need_several_experts_of_one_architecture(models):
    with pytest.raises(UserError, match="delta1"):
        store_weights(models, "delta1")


def test_weights_in_eight_bits_follow_a_cast_of_what_they_compute_in():
    layer = nn.Linear(64, 96).requires_grad_(False)
    store_weights(layer, "int8")
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.kept.values.dtype == torch.int8
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_small_layers_stay_as_they_are():
    layer = nn.Linear(8, 8)
    store_weights(layer, "int8")
    assert type(layer) is nn.Linear and "weight" in dict(layer.named_parameters())
    with pytest.raises(ValueError, match="no store 'int4'"):
        store_weights(layer, "int4")


def test_training_over_stored_experts_trains_the_same_aggregators_nearly(settings, tmp_path):  # noqa: F811
    runs = [replace(settings, store=store, steps=4, evaluate_every=4, output=str(tmp_path / str(store))) for store in (None, "int8")]
    histories = [train(run)["history"] for run in runs]
    assert histories[0] != histories[1]  # it is really used
    assert histories[1][-1]["held_out_loss"] == pytest.approx(histories[0][-1]["held_out_loss"], rel=2e-2)
    assert aggregators(runs[1]).keys() == aggregators(runs[0]).keys()


def test_checkpointed_stages_fetch_their_weights_again(settings, tmp_path):  # noqa: F811
    settings = replace(settings, store="fp8", steps=2)
    runs = [replace(settings, gradient_checkpointing=on, output=str(tmp_path / str(on))) for on in (False, True)]
    plain, checkpointed = (train(run)["history"] for run in runs)
    assert [entry["held_out_loss"] for entry in plain] == pytest.approx([entry["held_out_loss"] for entry in checkpointed], rel=1e-4)


def test_experts_in_the_memory_of_the_cpu_need_another_device(settings):  # noqa: F811
    with pytest.raises(UserError, match="--store cpu keeps experts beside a GPU"):
        plan(replace(settings, store="cpu"))


def test_the_memory_of_a_step_is_what_a_real_step_needs():
    def unets():
        return list(near(2, **ONE_LEVEL | {"block_out_channels": (64,)}))

    denoiser = UNetEnsemble(unets(), recipe=Recipe("sabw", {"hidden": 8, "heads": 1, "depth": 1}), placement="out")
    size = {"latent": (32, 32), "tokens": 5}
    counted = sampling_memory(denoiser, size, 2, torch.float32, [RESIDENT, "int8", "delta1"])
    peaks = [row["step"] for row in counted]
    assert peaks == sorted(peaks, reverse=True) and all(row["step"] > row["experts"] for row in counted)
    for row in counted:
        real = UNetEnsemble(unets(), recipe=denoiser.recipe, placement="out").requires_grad_(False)
        if row["store"] != RESIDENT:
            store_weights(real.experts, row["store"])
        assert stored_bytes(real.experts) == row["experts"], row["store"]
        call = call_of(real, 32, 32, 2, 5)
        weights = [*real.parameters(), *kept_tensors(real.experts)]
        with torch.no_grad(), LiveBytes() as live:
            for weight in weights:
                weight.view(-1)
            real(**call)
        assert live.peak == pytest.approx(row["step"], rel=0.05), row["store"]
