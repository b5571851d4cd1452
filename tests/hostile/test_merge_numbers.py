"""No merge reads or writes a number that is none, and what is no weight is never averaged: from files and in memory."""

import shutil

import pytest
import torch
from hostile import afa
from merging_models import saved, sd
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL, sd_unet, text_encoder
from torch import nn

from afa import UserError
from afa.merging.keys import merge_key
from afa.merging.memory import PartsMerge
from afa.merging.registry import MERGES, find_merge

UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
KEY = "mid_block.resnets.1.conv1.weight"
NONE = [float("nan"), float("inf"), float("-inf")]
OPTIONS = {"mbw": {"weights": {"base": (0.5, 0.5)}}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three in half precision."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("curves", "angles", "patterns")):
        saved(sd(seed, **ONE_LEVEL).to(torch.float16), root / name)
    return root


def changed(tmp_path, source, name, file, change):
    """A copy of an expert with other tensors in one file."""
    folder = shutil.copytree(source, tmp_path / name)
    tensors = load_file(folder / file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    return folder


def put(key, value, at=slice(7, 8)):
    def change(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[at] = value

    return change


@pytest.mark.parametrize(("file", "value"), [*((UNET, value) for value in NONE), (TEXT, NONE[0]), (VAE, NONE[1])])
def test_a_merge_of_files_names_the_expert_and_the_tensor_that_is_not_finite(experts, tmp_path, value, file):
    """Of what is merged and of what is copied."""
    key = next(key for key, tensor in load_file(experts / "curves" / file).items() if tensor.numel() > 8)
    broken = changed(tmp_path, experts / "curves", "broken", file, put(key, value))
    run = afa("merge", "--experts", broken, experts / "angles", "--output", tmp_path / "merged")
    assert run.refused and "'broken'" in run.err and key in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("method", [method for method in MERGES if find_merge(method).needs("base")])
def test_a_base_that_is_not_finite_is_named(experts, tmp_path, method):
    broken = changed(tmp_path, experts / "curves", "broken", UNET, put(KEY, float("nan")))
    run = afa("merge", "--method", method, "--experts", experts / "angles", experts / "patterns", "--base", broken, "--output", tmp_path / "m")
    assert run.refused and "'broken'" in run.err and KEY in run.err


@pytest.mark.parametrize(("dtype", "done"), [(None, False), ("float16", False), ("bfloat16", True), ("float32", True)])
def test_a_result_that_does_not_fit_the_outputs_type_is_refused_with_the_way_out(experts, tmp_path, dtype, done):
    high = changed(tmp_path, experts / "curves", "high", UNET, put(KEY, 60000.0))
    low = changed(tmp_path, experts / "curves", "low", UNET, put(KEY, -60000.0))
    more = ["--dtype", dtype] if dtype else []
    run = afa("merge", "--method", "add_difference", "--experts", f"a={high}", f"b={high}", "--base", low, "--output", tmp_path / "sum", *more)
    if done:
        assert run.code == 0
        assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "sum" / UNET).values())
    else:
        assert run.refused and KEY in run.err and "--dtype" in run.err and "180000" in run.err
        assert not (tmp_path / "sum").exists()


def test_a_copy_that_does_not_fit_the_outputs_type_is_refused(experts, tmp_path):
    wide = changed(tmp_path, experts / "curves", "wide", VAE, lambda tensors: tensors.update({"quant_conv.bias": tensors["quant_conv.bias"].float() + 1e6}))
    run = afa("merge", "--experts", wide, experts / "angles", "--output", tmp_path / "merged", "--dtype", "float16")
    assert run.refused and "quant_conv.bias" in run.err and "--dtype" in run.err


def parts(seed, dtype=torch.float32):
    return {"unet": sd_unet(seed, **ONE_LEVEL).to(dtype)}


@pytest.mark.parametrize("value", NONE)
def test_a_merge_in_memory_names_the_model_and_the_tensor_that_is_not_finite(value):
    one, other = parts(0), parts(1)
    with torch.no_grad():
        other["unet"].conv_in.weight[0, 0, 0, 0] = value
    for experts, base, name in (([one, other], None, "other"), ([one, one], other, "base")):
        with pytest.raises(UserError, match=rf"'{name}'.*unet\.conv_in\.weight"):
            PartsMerge(experts, ["one", "other" if base is None else "again", "base"], base)


def test_a_merge_in_memory_does_not_overflow_half_precision_without_a_word():
    one, other, base = (parts(seed, torch.float16) for seed in range(3))
    with torch.no_grad():
        one["unet"].conv_in.weight.fill_(60000.0)
        other["unet"].conv_in.weight.fill_(60000.0)
        base["unet"].conv_in.weight.fill_(-60000.0)
    merge = PartsMerge([one, other], ["one", "other", "base"], base)
    with pytest.raises(UserError, match=r"unet\.conv_in\.weight does not fit float16"):
        merge.apply("add_difference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("method", MERGES)
def test_every_method_computes_in_float32_and_rounds_once(method, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 30, generator=generator).to(dtype) for _ in range(3)]
    base = tensors.pop() if find_merge(method).needs("base") else None
    experts = tensors[:2] if method == "mbw" or find_merge(method).experts == 2 else tensors
    rule, options = find_merge(method).rule, OPTIONS.get(method, {})
    fine = merge_key(rule, [one.float() for one in experts], None if base is None else base.float(), key="unet.k", **options)
    assert fine.dtype == torch.float32
    came = merge_key(rule, experts, base, key="unet.k", **options)
    assert came.dtype == dtype and torch.equal(came.float(), fine.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cast_that_makes_infinity_or_nan_is_refused(dtype):
    big = torch.full((2, 2), 1e6)
    with pytest.raises(UserError, match=r"unet\.k does not fit float.*1e\+06"):
        merge_key(find_merge("weighted").rule, [big, big + 1], key="unet.k", dtype=dtype)
    with pytest.raises(UserError, match=r"makes NaN or infinity of unet\.k"):
        merge_key(find_merge("add_difference").rule, [big, big + 1], big + 3, key="unet.k", alpha=3e38)


# ---- what is no weight


WHOLE = torch.arange(24)[None]  # of the text encoder's 24 places
KINDS = {"int64": WHOLE, "int32": WHOLE.int(), "float16": WHOLE.half(), "float32 x 0.9": WHOLE * 0.9, "absent": None, "nan": WHOLE * float("nan")}


@pytest.mark.parametrize(
    ("first", "second"),
    [("int64", "float16"), ("int64", "absent"), ("absent", "float16"), ("float16", "int64"), ("int32", "nan"), ("float32 x 0.9", "int64")],
)
def test_position_ids_are_whole_numbers_from_0_or_absent_whatever_the_experts_hold(experts, tmp_path, first, second):
    folders = []
    for name, source, kind in (("one", "curves", first), ("two", "angles", second)):
        ids = KINDS[kind]
        folder = tmp_path / name
        (folder / "text_encoder").mkdir(parents=True)
        for part in (experts / source).iterdir():
            if part.name != "text_encoder":
                (folder / part.name).symlink_to(part)
        (folder / "text_encoder" / "config.json").symlink_to(experts / source / "text_encoder" / "config.json")
        tensors = load_file(experts / source / TEXT) | ({"embeddings.position_ids": ids} if ids is not None else {})
        save_file(tensors, folder / TEXT, metadata={"format": "pt"})
        folders.append(folder)
    run = afa("merge", "--experts", *folders, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert run.code == 0, run.err
    merged = load_file(tmp_path / "merged" / TEXT)
    ids = merged.get("embeddings.position_ids")
    assert ids is None or (ids.dtype == torch.int64 and torch.equal(ids, WHOLE))


class Counting(nn.Module):
    """A part with a buffer that is no weight."""

    def __init__(self, buffer):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("steps", buffer)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "text_encoder.steps"),
        (torch.tensor([True]), torch.tensor([False]), "text_encoder.steps"),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), "float32, expected torch.int64"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1, 2]), "int64, expected torch.float32"),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), None),
        (torch.tensor([True]), torch.tensor([True]), None),
    ],
)
def test_other_whole_numbers_are_the_same_in_all_or_refused(one, other, words):
    experts = [{**parts(seed), "text_encoder": Counting(buffer)} for seed, buffer in enumerate((one, other))]
    if words is not None:
        with pytest.raises(UserError, match=words):
            PartsMerge(experts, ["one", "other"])
        return
    merge = PartsMerge(experts, ["one", "other"])
    merge.apply("weighted")
    assert torch.equal(merge.parts["text_encoder"].steps, one)


def test_position_ids_of_models_in_memory_are_made_whole():
    experts = []
    for seed, kind in enumerate((WHOLE * 0.9, WHOLE.half())):
        encoder = text_encoder(seed, width=24)
        module = encoder.get_submodule("embeddings") if hasattr(encoder, "embeddings") else encoder.get_submodule("text_model.embeddings")
        module.register_buffer("position_ids", kind)
        experts.append({**parts(seed), "text_encoder": encoder})
    merge = PartsMerge(experts, ["one", "other"])
    merge.apply("weighted")
    (ids,) = (buffer for name, buffer in merge.parts["text_encoder"].named_buffers() if name.endswith("position_ids"))
    assert ids.dtype == torch.int64 and torch.equal(ids, WHOLE)


# ---- the rules themselves


def slerp(one, other, t=0.5):
    return merge_key(find_merge("slerp").rule, [one, other], key="unet.k", t=t)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 1e-3, 1.0, 3.0, torch.pi - 1e-3, torch.pi - 1e-6, torch.pi - 1e-9])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.75])
def test_slerp_is_right_at_every_angle(angle, t):
    """In a plane the answer is known: the length changes linearly, the angle in proportion."""
    angle = torch.tensor(angle, dtype=torch.float64)
    one = torch.tensor([2.0, 0.0], dtype=torch.float64)
    other = 3 * torch.stack([torch.cos(angle), torch.sin(angle)])
    wanted = (2 + t) * torch.stack([torch.cos(t * angle), torch.sin(t * angle)])
    assert torch.allclose(slerp(one, other, t), wanted, rtol=1e-6, atol=1e-6)
    if angle < 3.1:
        assert torch.allclose(slerp(one, other, t), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 1e-20, -1.0, -2.0, -4.0, 0.0])
def test_slerp_of_one_direction_its_opposite_and_nothing_is_the_straight_line(factor):
    one = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(one, factor * one, 0.3), one * (0.7 + 0.3 * factor), rtol=1e-5, atol=1e-6)


def test_ties_keeps_nan_visible():
    generator = torch.Generator().manual_seed(0)
    one, other, base = (torch.randn(20, generator=generator) for _ in range(3))
    one[3] = float("nan")
    for density in (0.05, 0.5, 1.0):
        assert MERGES["ties"].rule([one, other], base=base, density=density)[3].isnan()


@pytest.mark.parametrize(
    ("method", "option", "values"),
    [
        ("ties", "density", (0, -0.1, 1.1, float("nan"), float("inf"))),
        ("dare", "drop", (-0.1, 1.0, 2, float("nan"))),
        ("slerp", "t", (-0.1, 1.1, float("nan"))),
        ("task_arithmetic", "scale", (float("nan"), float("inf"))),
        ("add_difference", "alpha", (float("nan"), float("-inf"))),
        ("weighted", "weights", ([], [1.0], [0, 0], [1, -1], [float("nan"), 1], [float("inf"), 1])),
        ("mbw", "weights", ({"others": float("nan")}, {"others": [0, 0]}, {"others": [float("inf"), 1]}, {"others": 1.5})),
    ],
)
def test_options_out_of_their_bounds_are_refused(method, option, values):
    base = parts(2) if find_merge(method).needs("base") else None
    merge = PartsMerge([parts(0), parts(1)], ["one", "other", "base"], base)
    for value in values:
        with pytest.raises(UserError):
            merge.apply(method, **{option: value})


def test_model_stock_says_how_many_tensors_are_the_bases(experts, capsys, tmp_path):
    one, other, base = parts(0), parts(1), parts(2)
    with torch.no_grad():
        for name in ("conv_in.weight", "conv_out.weight"):
            away = torch.randn_like(base["unet"].get_parameter(name))
            one["unet"].get_parameter(name).copy_(base["unet"].get_parameter(name) + away)
            other["unet"].get_parameter(name).copy_(base["unet"].get_parameter(name) - away)
    merge = PartsMerge([one, other], ["one", "other", "base"], base)
    merge.apply("model_stock")
    said = capsys.readouterr().err
    assert merge.fallen_back >= 2 and f"model_stock: {merge.fallen_back} of " in said
    assert torch.equal(merge.parts["unet"].conv_in.weight, base["unet"].conv_in.weight)
    merge.apply("task_arithmetic")
    assert merge.fallen_back == 0 and "tensors are the base's" not in capsys.readouterr().err

    key, weights = "conv_in.weight", load_file(experts / "patterns" / UNET)
    pair = [
        changed(tmp_path, experts / "patterns", name, UNET, lambda held, sign=sign: held.update({key: weights[key] + sign * 0.125}))
        for name, sign in (("plus", 1), ("minus", -1))
    ]
    run = afa("merge", "--method", "model_stock", "--experts", *pair, "--base", experts / "patterns", "--output", tmp_path / "m", "--json")
    assert run.code == 0 and '"fallen_back": 1' in run.out and "model_stock: 1 of " in run.err
