"""Seeds of 64 bits: used everywhere, told apart, and refused by name where they are none."""

import re

import numpy as np
import pytest
import torch

from afa.cli.main import main
from afa.demo.data import EXPERTS
from afa.errors import UserError
from afa.evaluation.protocols import ProtocolOptions as Asked
from afa.images import read_metadata
from afa.sampling.sample import Request, Sampling
from afa.screening.plan import Probes
from afa.seeds import SEEDS, draw_seed, generator, nth_seed

LARGE = (5, 2**32 + 5, 2**63 + 5, SEEDS - 1)
CURVES = str(EXPERTS["curves"])


def test_seeds_that_differ_in_any_bit_have_noises_of_their_own():
    noises = [torch.randn(4, generator=generator(seed)) for seed in (*LARGE, *(2**bit for bit in range(64)))]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(noises)


def test_seeds_below_32_bits_are_torchs_own():
    for seed in (0, 1, 2**32 - 1):
        assert torch.equal(torch.randn(4, generator=generator(seed)), torch.randn(4, generator=torch.Generator().manual_seed(seed)))


def test_probes_of_a_screening_know_every_seed():
    made = [Probes(torch.zeros(1, 4, 2, 2), ["a"], torch.zeros(1, 6), 2, seed).noise(0) for seed in LARGE]
    assert all(not torch.equal(one, other) for index, one in enumerate(made) for other in made[:index])


def test_after_the_last_seed_comes_the_first():
    assert [item.seed for item in Asked(seed=SEEDS - 1).items(["a", "b"])] == [SEEDS - 1, 0]
    assert nth_seed(SEEDS - 2, 3) == 1


@pytest.mark.parametrize("seed", [-1, SEEDS, 1.5, "7", None, float("nan")])
def test_a_request_in_python_is_refused_by_its_seed(seed):
    with pytest.raises(UserError, match="^seed "):
        Request("a", seed)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", 10**9), ("guidance", float("nan")), ("guidance", -1), ("true_guidance", float("inf"))])
def test_sampling_in_python_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name} "):
        Sampling(**{"steps": 1, name: value})


@pytest.mark.parametrize("seed", [-3, SEEDS])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", CURVES, "--prompt", "a"],
        ["explain", "--prompt", "a"],
        ["train", "--experts", CURVES, CURVES, "--data", "scenes:8"],
        ["finetune", CURVES, "--rank", "1", "--data", "scenes:8"],
        ["distill", CURVES, "--data", "scenes:8"],
        ["screen", CURVES, CURVES, "--data", "scenes:8"],
        ["evaluate", "--ensemble", CURVES, "--protocol", "scenes"],
        ["search", "--experts", CURVES, CURVES, "--prompt", "a"],
        ["merge", "--experts", CURVES, CURVES],
        ["demo"],
    ],
    ids=lambda command: command[0] if isinstance(command, list) else command,
)
def test_a_seed_that_is_none_is_refused_by_name(command, seed, tmp_path, capsys):
    assert main([*command, "--output", str(tmp_path / "out"), "--seed", str(seed)]) == 2
    assert f"--seed {seed} is too" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_minus_one_draws_a_seed_and_tells_it(tmp_path, capsys):
    command = ["generate", CURVES, "--prompt", "a", "--steps", "1", "--device", "cpu", "--output"]
    assert main([*command, str(tmp_path / "drawn"), "--seed", "-1"]) == 0
    (seed,) = re.findall(r"--seed (\d+) ", capsys.readouterr().err)
    assert read_metadata(tmp_path / "drawn/00000-00.png")["seed"] == int(seed)
    assert len({draw_seed() for _ in range(8)}) == 8


def test_pictures_of_large_seeds_are_drawn_and_differ(tmp_path, capsys):
    from PIL import Image

    pictures = []
    for seed in LARGE[:1] + LARGE[1:]:
        command = ["generate", CURVES, "--prompt", "a", "--steps", "1", "--device", "cpu", "--seed", str(seed), "--output", str(tmp_path / str(seed))]
        assert main(command) == 0, capsys.readouterr().err
        pictures.append(np.asarray(Image.open(tmp_path / str(seed) / "00000-00.png")))
    assert all((one != other).any() for index, one in enumerate(pictures) for other in pictures[:index])


def test_more_steps_than_the_schedule_has_are_refused(tmp_path, capsys):
    command = ["generate", CURVES, "--prompt", "a", "--steps", "1001", "--device", "cpu", "--output", str(tmp_path)]
    assert main(command) == 2
    assert "1001 steps are more than the 1000" in capsys.readouterr().err
