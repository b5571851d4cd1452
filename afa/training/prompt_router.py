"""The prompt router: one expert for each prompt, the one whose loss a linear model foretells to be lowest.

Source: Li et al., Cost-Aware Routing for Efficient Text-To-Image Generation, arXiv:2506.14753, which routes
each prompt to one of several models by its complexity. Deviation: what is foretold is the diffusion loss on
the training images, all experts cost the same, and the predictor is a ridge regression.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from afa.denoiser.hooks import only_expert
from afa.ensemble import Ensemble
from afa.experts.headers import load_tensors
from afa.files import settled, staged
from afa.fingerprint import check_same
from afa.latents import latents_of
from afa.schema import Count, Score, Within, build
from afa.stats import estimate
from afa.text_files import read_json
from afa.training.conditions import Conditions, encode_prompt
from afa.training.data import Encoded
from afa.training.measure import SEED as HELD_OUT
from afa.training.measure import HeldOut
from afa.training.noise import Noising
from afa.training.objective_registry import PLAIN
from afa.training.objective_terms import Objectives
from afa.training.objectives import Mse, Term, Total
from afa.training.prepare import buckets_of, encode_data, find_data, resolution_of
from afa.training.settings import TrainSettings
from afa.version import __version__

FILE, RECORD = "prompt_router.safetensors", "prompt_router.json"
NOISES = 8  # at most, of each image
SEED = 25_061  # keeps the noises apart from other uses of the same seed
PENALTIES = np.logspace(-6, 3, 37)  # times the largest variance of the text states
LEAST_FREEDOM = 0.01  # a share: with less, the captions are learnt by heart


@dataclass(frozen=True)
class PromptRouter:
    """A linear model of the experts' losses.

    centre:  (D,) means of the text states
    weights: (D, N)
    offset:  (N,)
    """

    centre: Tensor
    weights: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, states: Tensor, losses: Tensor) -> "PromptRouter":
        """Fit a ridge regression in closed form; generalised cross-validation chooses its penalty.

        states: (n, D) of the captions
        losses: (n, N) of the experts
        Computed in float64. Where text tells nothing, the penalty leaves the experts' mean losses.
        """
        x, y = states.double(), losses.double()
        centre, offset = x.mean(0), y.mean(0)
        x, y = x - centre, y - offset
        variances, axes = torch.linalg.eigh(x.T @ x)
        variances = variances.clamp(min=0)
        projected = axes.T @ (x.T @ y)  # (D, N)
        total, count = y.square().sum(), len(x)

        def score(penalty: float) -> float:
            """Return the generalised cross-validation of a penalty."""
            damped = variances + penalty
            explained = 2 / damped - variances / damped.square()
            rest = total - (projected.square() * explained[:, None]).sum()
            freedom = float(1 - (1 + (variances / damped).sum()) / count)  # 1: of the offset
            return float(rest) / freedom**2 if freedom > LEAST_FREEDOM else math.inf

        unit = float(variances.max().clamp(min=torch.finfo(torch.float64).tiny))
        penalty = min((float(share) * unit for share in PENALTIES), key=score)
        weights = axes @ (projected / (variances + penalty)[:, None])
        return cls(centre.float(), weights.float(), offset.float())

    def choose(self, states: Tensor) -> list[int]:
        """Return the index of the expert with the lowest foretold loss: (n, D) to n."""
        found: list[int] = ((states - self.centre) @ self.weights + self.offset).argmin(1).tolist()
        return found

    @classmethod
    def read(cls, folder: Path) -> "PromptRouter":
        """Read what train_prompt_router() wrote."""
        tensors = load_tensors(folder / FILE)
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


class TextReader:
    """Turns prompts into what the router sees: the mean over tokens of the states that the experts read.

    ensemble: its text encoders are on its device
    """

    def __init__(self, ensemble: Ensemble, batch_size: int = 32) -> None:
        self.pipeline, self.interface = ensemble.pipeline(), ensemble.denoiser.interface
        self.device, self.batch_size = next(ensemble.denoiser.parameters()).device, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return (n, D) float32 on the CPU."""
        found = []
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            encoded = encode_prompt(self.pipeline, batch, self.device, guided=False)
            states, *more = self.interface.select_prompt_outputs(encoded)
            states = states.flatten(2)  # states of several layers side by side
            there = states.new_ones(states.shape[:2])
            if self.interface.variable_length and more[0] is not None:
                there = more[0].to(states)
            means = (states.float() * there[..., None].float()).sum(1) / there.float().sum(1, keepdim=True)
            found.append(means.cpu())
        return torch.cat(found)


class RouterRecord(TypedDict):
    """The fields of prompt_router.json that are read again.

    chosen: how many images of the comparison each expert draws
    """

    settings: dict[str, Any]
    seconds: Annotated[float, Within(0)]
    held_out_loss: dict[str, dict[str, Score]]
    chosen: dict[str, Count]


def router_finished(settings: TrainSettings) -> dict[str, Any] | None:
    """Return the record of a trained router; None if there is none. Raises UserError if it was another."""
    file = settled(Path(settings.output)) / RECORD
    if not file.exists():
        return None
    record: dict[str, Any] = build(RouterRecord, read_json(file, nan=True), file)
    check_same(record["settings"], _plain(settings), f"the prompt router in {settings.output}")
    return record


def _plain(settings: TrainSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings.binding()))
    return plain


@dataclass(frozen=True)
class ExpertLosses:
    """What the experts lose on the training images and on the held-out images.

    captions: of the n training images
    relative: (n, N) losses divided by the experts' mean at the same noise, mean over noises
    noises:   of each training image
    held_out: (m, N) losses on the held-out images, with captions held_captions
    """

    captions: list[str]
    relative: NDArray[np.float64]
    noises: int
    held_captions: list[str]
    held_out: NDArray[np.float64]


def measure_experts(settings: TrainSettings, ensemble: Ensemble) -> ExpertLosses:
    """Measure every expert on the data of a training, at fixed noise.

    No more noisy images are measured than the training sees, and of an image, uncropped, at most NOISES.
    """
    settings = replace(settings, crops=0, flip=False)  # one row an image, which has one caption
    source, denoiser = find_data(settings), ensemble.denoiser
    device = next(denoiser.parameters()).device
    vae = ensemble.frame.vae.to(device)
    resolution, buckets = resolution_of(settings, ensemble), buckets_of(settings, ensemble, source)
    data, held_out = encode_data(settings, source, resolution, vae, buckets=buckets)
    noising = Noising(ensemble.frame.scheduler, latents_of(vae), device)
    total = Total([Term(PLAIN, 1.0, Mse(noising))])
    objectives = Objectives(noising, total, total)
    conditions = Conditions(ensemble.pipeline(), denoiser, device)

    budget = settings.steps * settings.batch_size * settings.accumulate
    data = _first(data, budget)
    noises = max(1, min(NOISES, budget // len(data)))
    seeds = np.random.SeedSequence([SEED, settings.seed]).generate_state(noises).tolist()

    def losses(images: Encoded, seed: int, what: str) -> NDArray[np.float64]:
        measure = HeldOut(images, objectives, conditions, settings.batch_size, seed)
        found = []
        for name in tqdm(denoiser.names, desc=f"prompt router, {what}", unit="expert", file=sys.stderr):
            with only_expert(denoiser, name):
                found.append(measure.measure(denoiser).losses)
        return np.stack(found, axis=1)

    drawn = np.stack([losses(data, seed, f"noise {place}/{noises}") for place, seed in enumerate(seeds, 1)])
    relative = (drawn / drawn.mean(2, keepdims=True)).mean(0)
    return ExpertLosses(
        data.captions, relative, noises, held_out.captions, losses(held_out, HELD_OUT, "held-out images")
    )


def _first(data: Encoded, images: int) -> Encoded:
    """Return the first images of a set that has one row for each."""
    if len(data) <= images:
        return data
    # Moments that no caption refers to are never read.
    cut = {"captions": data.captions[:images], "sizes": data.sizes[:images], "repeats": ()}
    return replace(data, **cut)


def train_prompt_router(
    settings: TrainSettings, ensemble: Ensemble, prompts: Sequence[str]
) -> dict[str, Any]:
    """Measure the experts, fit the router, and write it into settings.output.

    settings: of the ensemble's training: data, split, number of noisy images and seed are taken
    ensemble: on its device; its aggregators are not used
    prompts:  of the images that the router will draw; the record counts how often each expert is chosen
    Returns the record that is kept beside the router. Raises UserError.
    """
    began = time.monotonic()
    found = measure_experts(settings, ensemble)
    read, names = TextReader(ensemble, settings.batch_size), ensemble.names
    router = PromptRouter.fit(read(found.captions), torch.from_numpy(found.relative))
    held, chosen = router.choose(read(found.held_captions)), router.choose(read(prompts))
    losses = {name: found.held_out[:, place] for place, name in enumerate(names)}
    losses["trained"] = found.held_out[np.arange(len(held)), held]
    record = {
        "settings": _plain(settings),
        "afa": __version__,
        "torch": torch.__version__,
        "training_images": len(found.captions),
        "noises": found.noises,
        "held_out_loss": {name: asdict(estimate(values)) for name, values in losses.items()},
        "chosen": {name: chosen.count(place) for place, name in enumerate(names)},
        "seconds": round(time.monotonic() - began, 1),
    }
    with staged(Path(settings.output), last=RECORD) as stage:
        tensors = {field.name: getattr(router, field.name).contiguous() for field in fields(router)}
        save_file(tensors, stage / FILE, metadata={"format": "pt", "afa": __version__})
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record
