"""Text tokens of every expert's own, or fused where image tokens are? On small SD3-type experts of the embedded world.

Experts are made on the spot: one base transformer, fine-tuned on each domain of captioned scenes (afa/demo), with the embedded VAE and
text encoder. Then aggregators are trained on mixed scenes, both ways, with the same seeds, batches and noise; what is printed is the
held-out loss and the difference, paired by scene (seeds averaged first), with 95 % intervals.

    python benchmarks/text_stream.py                      # two cores: about ten minutes
    python benchmarks/text_stream.py --quick 20           # a twentieth of the steps, to see that it runs
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import trange

from afa.aggregators.registry import Recipe, count_parameters
from afa.demo.data import BASE as BASE_MODEL
from afa.experts.description import describe
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.latents import latents_of
from afa.models.registry import FAMILIES
from afa.models.sd3 import SD3Ensemble
from afa.stats import difference, estimate
from afa.training.noise import Batch, Noising

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_world.denoisers import CAPTION_DROPOUT, Parts, training_set
from scripts.demo_world.fit import Schedule, fit
from scripts.demo_world.parts import token_ids
from scripts.demo_world.worlds import FAR_PLAN

DOMAINS = ("curves", "angles", "patterns")
BASE, EXPERT = Schedule(800, 1e-3, batch=32, average=0.995), Schedule(300, 5e-4, batch=32, average=0.995)
HELD_OUT, TRAINED = 96, 464
CPU = torch.device("cpu")


class World:
    """Latents and text states of scenes, and the flow between latents and noise."""

    def __init__(self, work: Path, quick: int) -> None:
        base = describe(locate(ExpertSpec("base", str(BASE_MODEL))))
        networks = (base.components[name].load(torch.float32) for name in ("text_encoder", "vae"))
        self.parts = Parts(base.tokenizers[0], *networks)
        self.work, self.quick = work, quick
        self.noising = Noising(FlowMatchEulerDiscreteScheduler(shift=1.0), latents_of(self.parts.vae), CPU)
        self.interface = FAMILIES["sd3"].interface
        self.nothing = [part[0] for part in self._texts(token_ids(self.parts.tokenizer, [""]))]

    @torch.no_grad()
    def _texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, T, D) and pooled states (n, D)."""
        said = self.parts.text_encoder(ids)
        return said.last_hidden_state, said.pooler_output

    def scenes(self, domain: str, count: int, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Latents of unit variance (n, 4, 16, 16), and their captions' states."""
        latents, ids = training_set(FAR_PLAN, domain, count, seed, self.parts, self.work)
        return latents, self._texts(ids)

    def loss(
        self, model: nn.Module, data: tuple[Tensor, tuple[Tensor, Tensor]], rows: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Of each row, (B,): the squared error of the velocity at a random time, captions dropped now and then."""
        batch = self._batch(
            data[0][rows], torch.randint(self.noising.steps, (len(rows),), generator=rng), rng
        )
        dropped = torch.rand(len(rows), generator=rng) < CAPTION_DROPOUT
        told = [
            torch.where(dropped.view(-1, *[1] * (part.ndim - 1)), nothing, part[rows])
            for part, nothing in zip(data[1], self.nothing, strict=True)
        ]
        return self._error(model, batch, told)

    def held_out(self, model: nn.Module, data: tuple[Tensor, tuple[Tensor, Tensor]]) -> np.ndarray:
        """Of each scene at eight times spread evenly, the noise fixed: (n,)."""
        rng, count = torch.Generator().manual_seed(1), len(data[0])
        losses = []
        for place in range(8):
            steps = torch.full((count,), int((place + 0.5) * self.noising.steps / 8))
            with torch.no_grad():
                losses.append(self._error(model, self._batch(data[0], steps, rng), list(data[1])))
        return torch.stack(losses).mean(0).numpy()

    def _batch(self, latents: Tensor, steps: Tensor, rng: torch.Generator) -> Batch:
        return Batch(latents, torch.randn(latents.shape, generator=rng), steps)

    def _error(self, model: Any, batch: Batch, told: list[Tensor]) -> Tensor:
        noisy = self.noising.noisy(batch.latents, batch.noise, batch.steps)
        conditions = self.interface.conditions(model.config, told, torch.empty(0))
        answer = model(
            **self.interface.denoiser_kwargs(model.config, noisy, self.noising.timesteps(batch.steps), conditions),
            return_dict=False,
        )[0]
        return (answer - self.noising.target(batch)).square().mean((1, 2, 3))


def new_transformer() -> SD3Transformer2DModel:
    """Five joint blocks, 96 wide: 64 image tokens beside 24 of text."""
    size = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 16,
        "num_attention_heads": 6,
    }
    text = {
        "joint_attention_dim": 64,
        "caption_projection_dim": 96,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
    }
    torch.manual_seed(0)
    return SD3Transformer2DModel(**size, **text, qk_norm="rms_norm")


def make_experts(world: World) -> list[SD3Transformer2DModel]:
    """One base, that goes on with each domain."""
    base = new_transformer()
    _fit(world, "base", base, "union", BASE)
    experts = [copy.deepcopy(base) for _ in DOMAINS]
    for domain, expert in zip(DOMAINS, experts, strict=True):
        _fit(world, domain, expert, domain, EXPERT)
    return experts


def _fit(world: World, name: str, model: nn.Module, domain: str, schedule: Schedule) -> None:
    data = world.scenes(domain, 6000 // world.quick, 20)
    shorter = Schedule(schedule.steps // world.quick, schedule.rate, schedule.batch, schedule.average)

    def loss(rng: torch.Generator) -> Tensor:
        return world.loss(
            model, data, torch.randint(len(data[0]), (shorter.batch,), generator=rng), rng
        ).mean()

    fit(name, model, loss, shorter, world.work)
    model.eval()


def train_aggregators(
    world: World, experts: list[Any], kind: str, stream: str, seed: int, steps: int, data: Any
) -> SD3Ensemble:
    """Batches and noise depend on seed and step only, so that both ways see the same."""
    torch.manual_seed(seed)
    recipe = Recipe(kind, {"hidden": 32, "heads": 4, "depth": 1}, text_stream=stream)
    ensemble = SD3Ensemble(experts, DOMAINS, recipe).train()
    parameters = list(ensemble.aggregators.parameters())
    optimiser = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    for step in trange(steps, desc=f"{kind}, {stream}, seed {seed}", mininterval=5, file=sys.stderr):
        rng = torch.Generator().manual_seed(seed * 100_000 + step)
        world.loss(ensemble, data, torch.randint(len(data[0]), (8,), generator=rng), rng).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return ensemble.eval()


def compare(world: World, experts: list[Any], seeds: int, steps: int) -> None:
    latents, texts = world.scenes("mixed", TRAINED + HELD_OUT, 40)
    training = latents[:-HELD_OUT], tuple(part[:-HELD_OUT] for part in texts)
    judged = latents[-HELD_OUT:], tuple(part[-HELD_OUT:] for part in texts)
    print(
        f"held-out loss of velocity, mixed scenes, n = {HELD_OUT}, {seeds} training seeds of {steps} steps, mean [95 %]"
    )
    for domain, expert in zip(DOMAINS, experts, strict=True):
        print(f"  expert {domain:16} {_shown(world.held_out(expert, judged))}")
    for kind in ("sabw", "stitch"):
        losses = {}
        for stream in ("own", "fused"):
            trained = [
                train_aggregators(world, experts, kind, stream, seed, steps, training)
                for seed in range(seeds)
            ]
            losses[stream] = np.mean([world.held_out(one, judged) for one in trained], axis=0)
            parameters = count_parameters(trained[0].aggregators)
            print(f"  {kind}, text {stream:10} {_shown(losses[stream])}  ({parameters:,} trained parameters)")
        found = difference(losses["fused"], losses["own"])
        print(f"  {kind}, fused minus own  {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")


def _shown(losses: np.ndarray) -> str:
    found = estimate(losses)
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    flags.add_argument("--steps", type=int, default=100, help="of training the aggregators (default: 100)")
    flags.add_argument(
        "--quick", type=int, default=1, help="divide the steps and scenes of making experts by this"
    )
    flags.add_argument(
        "--work", type=Path, help="folder that keeps what is made, to go on from (default: none is kept)"
    )
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        work = given.work or Path(kept)
        work.mkdir(parents=True, exist_ok=True)
        world = World(work, given.quick)
        compare(world, make_experts(world), given.seeds, max(1, given.steps // given.quick))


if __name__ == "__main__":
    main()
