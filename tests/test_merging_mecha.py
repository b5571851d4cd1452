"""Agreement with an independent implementation, the package sd-mecha, to 1e-6 on the same safetensors files.

Where its definitions are others, what coincides is tested, and the difference is said. It computes in float64 here.
"""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from merging_models import saved, small_text, small_tokenizer, small_vae
from original_layout import write_single_file
from safetensors.torch import load_file, save_file
from tiny import scheduler, sd_unet
from torch import Tensor

from afa.merging.engine import merge_files
from afa.merging.rules import dare, model_stock, slerp, ties
from afa.merging.settings import MergeSettings

sd_mecha = pytest.importorskip("sd_mecha")
linear = sd_mecha.extensions.builtin.merge_methods.linear
dropout = sd_mecha.extensions.builtin.merge_methods.ties.dropout

CLOSE = {"atol": 1e-6, "rtol": 0}
# Tensors of every shape, of all parts: sd-mecha takes a millisecond for each. Methods know nothing of their places, but for block weights.
SOME = ("time_embed.", "input_blocks.0.", "input_blocks.1.", "input_blocks.3.", "middle_block.0.", "middle_block.1.", "output_blocks.8.", "out.")
SOME = (*(f"model.diffusion_model.{place}" for place in SOME), "cond_stage_model.")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three experts and their base with SD 1.x' own names, which is how sd-mecha recognises them."""
    home = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(["a", "b", "c", "base"]):
        parts = {"unet": sd_unet(seed), "text_encoder": small_text(seed, 24), "vae": small_vae(seed)}
        others = {"tokenizer": small_tokenizer(), "scheduler": scheduler(), "safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **others, requires_safety_checker=False)
        tensors = load_file(write_single_file(pipe, home / f"{name}.safetensors"))
        save_file({key: tensor for key, tensor in tensors.items() if key.startswith(SOME)}, home / f"some_{name}.safetensors")
    saved(pipe, home / "config")
    return home


def ours(home: Path, output: Path, method: str, experts: str, **options) -> dict[str, Tensor]:
    """Our merge of some experts; a and b mean a.safetensors and b.safetensors. Without the VAE, which is not merged."""
    base = {"base": str(home / "base.safetensors")} if options.pop("based", False) else {}
    files = [str(home / f"{name}.safetensors") for name in experts]
    merge_files(MergeSettings(files, str(output / "ours.safetensors"), method=method, config=str(home / "config"), **base, **options))
    return {key: tensor for key, tensor in load_file(output / "ours.safetensors").items() if not key.startswith("first_stage_model.")}


def theirs(recipe, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return sd_mecha.merge(recipe, merge_dtype=dtype, output_dtype=torch.float32, threads=0, total_buffer_size=1 << 22, tqdm=SilentBar)


class SilentBar:
    """What sd-mecha asks of a progress bar."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def models(home: Path, some: str = "some_") -> list:
    return [sd_mecha.model(str(home / f"{some}{name}.safetensors"), config="sd1-ldm") for name in ("a", "b", "c", "base")]


def agree(mine: dict[str, Tensor], their: dict[str, Tensor], some: tuple[str, ...] = SOME, count: int = 100) -> None:
    mine = {key: tensor for key, tensor in mine.items() if key.startswith(some)}
    assert mine.keys() <= their.keys()
    assert sum(key.startswith("model.diffusion_model.") for key in mine) > count
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, their[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_weighted_sum(home, tmp_path):
    a, b, *_ = models(home)
    agree(ours(home, tmp_path, "weighted", "ab", weights=["0.7", "0.3"]), theirs(sd_mecha.weighted_sum(a, b, alpha=0.3)))


def test_weighted_sum_of_three(home, tmp_path):
    a, b, c, _ = models(home)
    agree(ours(home, tmp_path, "weighted", "abc"), theirs(sd_mecha.n_average(a, b, c)))


def test_add_difference(home, tmp_path):
    a, b, _, base = models(home)
    agree(ours(home, tmp_path, "add_difference", "ab", based=True, alpha=0.6), theirs(sd_mecha.add_difference(a, b, base, alpha=0.6)))


def test_slerp(home, tmp_path):
    a, b, *_ = models(home)
    agree(ours(home, tmp_path, "slerp", "ab", t=0.4), theirs(sd_mecha.slerp(a, b, alpha=0.4)))


def test_task_arithmetic(home, tmp_path):
    a, b, c, base = models(home)
    total = base
    for model in (a, b, c):
        total = linear.add_difference(total, linear.subtract(model, base), alpha=0.4)
    agree(ours(home, tmp_path, "task_arithmetic", "abc", based=True, scale=0.4), theirs(total))


def test_block_weights(home, tmp_path):
    """It counts time_embed to BASE, we (as bbc-mc) to IN00: with equal weights for both, all agrees."""
    stages = [*(f"IN{k:02}" for k in range(12)), "M00", *(f"OUT{k:02}" for k in range(12))]
    shares = {"BASE": 0.2, **{stage: 0.2 + 0.03 * place for place, stage in enumerate(stages)}}
    a, b, *_ = models(home, "")
    blocks = sd_mecha.convert(sd_mecha.literal(shares, config="sd1-supermerger_blocks"), "sd1-ldm")
    numbers = ",".join(map(str, shares.values()))
    agree(ours(home, tmp_path, "mbw", "ab", weights=[numbers]), theirs(sd_mecha.weighted_sum(a, b, alpha=blocks)), ("",), 600)


def test_ties_with_all_differences(home, tmp_path):
    """Its vote_sgn=True elects by the sum of the values, as the paper does; its default is the majority of signs.

    In float64 its smallest value can fall below a limit it rounds to float32: here it computes in float32.
    """
    a, b, c, base = models(home)
    deltas = [linear.subtract(model, base) for model in (a, b, c)]
    recipe = linear.add_difference(base, sd_mecha.ties_sum(*deltas, k=1.0, vote_sgn=True), alpha=0.8)
    agree(ours(home, tmp_path, "ties", "abc", based=True, density=1.0, scale=0.8), theirs(recipe, torch.float32))


def on_one_key(method, *tensors: Tensor, **options) -> Tensor:
    """A method of sd-mecha on single tensors."""
    return method.__wrapped__(*(tensor.double() for tensor in tensors), **options).float()


def random(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_of_the_largest(density):
    """It keeps n - int((1 - k) n) + 1 of n values, one more than the fraction; asked for one less, it agrees."""
    *experts, base = random(4, 30, 10)
    k = density - 1 / 300 - 1e-9
    expected = base + on_one_key(sd_mecha.ties_sum, *(expert - base for expert in experts), k=k, vote_sgn=True)
    torch.testing.assert_close(ties(experts, base=base, density=density), expected, **CLOSE)


def test_model_stock_of_two():
    """It takes cosines along the last axis (per row) and of neighbours only: for two vectors that is the same."""
    base, first, other = random(3, 500)
    second = first + 0.8 * other  # a positive cosine: below zero we stay at the base
    differences = [first - base, second - base]
    expected = base + on_one_key(sd_mecha.model_stock, *differences)
    torch.testing.assert_close(model_stock([first, second], base=base), expected, **CLOSE)


def test_dare_without_dropping():
    """Its masks are numpy's, and it averages what is left where the paper sums; without dropping, λ = 1/N is its mean."""
    *experts, base = random(4, 30, 10)
    expected = base + on_one_key(dropout, *(expert - base for expert in experts), probability=0.0)
    torch.testing.assert_close(dare(experts, base=base, key="k", drop=0.0, scale=1 / 3), expected, **CLOSE)


def test_slerp_of_nearly_parallel_tensors():
    (tensor,) = random(1, 100)
    other = tensor * 1.5 + 1e-4
    torch.testing.assert_close(slerp([tensor, other], t=0.3), on_one_key(sd_mecha.slerp, tensor, other, alpha=torch.tensor(0.3)), **CLOSE)


def test_its_default_ties_elects_by_number_and_ours_by_sum():
    """Two small pluses against a large minus: the paper takes the minus."""
    base = torch.zeros(2)
    experts = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([-5.0, 2.0])]
    assert ties(experts, base=base, density=1.0)[0] == -5
    assert on_one_key(sd_mecha.ties_sum, *experts, k=1.0)[0] == 1


def test_its_model_stock_has_factors_far_beyond_one():
    """A cosine per row may come near -1 / (N - 1), where t = N cos / (1 + (N - 1) cos) has its pole; ours is in [0, 1]."""
    base, one = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    other = torch.tensor([[-1.0, 1e-3]])
    factor = on_one_key(sd_mecha.model_stock, one, other) / ((one + other) / 2)
    assert factor[0, 1] < -1e6
    assert torch.equal(model_stock([one, other], base=base), base)


def test_its_apply_stock_switches_the_stock_factor_off():
    _, one, other = random(3, 500)
    plain = on_one_key(sd_mecha.ties_sum, one, other, k=1.0, vote_sgn=True)
    asked, unasked = (on_one_key(sd_mecha.ties_sum_extended, one, other, k=1.0, vote_sgn=True, apply_stock=how) for how in (True, False))
    torch.testing.assert_close(asked, plain, **CLOSE)
    assert not torch.allclose(unasked, plain, rtol=0.01)
