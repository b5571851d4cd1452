"""A forecast of a training run: steps, time and memory, measured before it begins."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from afa.aggregators.registry import count_parameters
from afa.cost import call_of
from afa.data.buckets import Buckets
from afa.data.sources import ImageSource
from afa.defaults import few_images
from afa.denoiser.base import EnsembleDenoiser
from afa.devices import LiveBytes, choose_device
from afa.ensemble import Ensemble
from afa.experts.quantised import kept_elsewhere, store_weights, stored_bytes
from afa.latents import latents_of
from afa.memory import fake_copy, made
from afa.training.conditions import Conditions
from afa.training.data import Encoded, count_held_out
from afa.training.measure import HeldOut
from afa.training.objective_terms import make_context, make_objectives
from afa.training.objectives import Pass
from afa.training.reward_objectives import Decoder
from afa.training.settings import LoopSettings

COPIES = 2  # of what is trained, besides the optimiser's: the moving average, and the best so far


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the training device.

    step:   the peak during a step, with all that it needs
    frozen: weights of the experts
    beside: weights of VAE and text encoders, which a cache makes unnecessary
    """

    step: int
    frozen: int
    beside: int

    @property
    def total(self) -> int:
        return self.step + self.beside


def step_bytes(
    denoiser: EnsembleDenoiser,
    batch_size: int,
    side: int,
    dtype: torch.dtype,
    checkpointing: bool,
    store: str | None = None,
    vae: Any = None,
    *,
    largest_maps_only: bool = False,
) -> int:
    """Return the peak bytes of tensors in a training step: weights, activations, gradients, optimiser.

    The step runs on a copy under FakeTensorMode, which picks the same kernels as a real step (fused attention
    above all).
    checkpointing, largest_maps_only: as of denoiser.enable_gradient_checkpointing; without the first, nothing
           is recomputed
    side:  of the latent, in latent pixels
    store: see afa.experts.quantised
    vae:   of an objective that scores images; None: no image is decoded
    Not included: fragmentation of the allocator, and a reward's own network.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = fake_copy(denoiser, dtype, torch.float32)
        if checkpointing:
            twin.enable_gradient_checkpointing(largest_maps_only=largest_maps_only)
        twin.train()
        decoder = None if vae is None else Decoder(made(vae, dtype), checkpointing)
        elsewhere: list[torch.Tensor] = []
        if store is not None:
            store_weights(twin.experts, store)
            elsewhere = kept_elsewhere(twin.experts)
        with LiveBytes(elsewhere) as counter:
            optimiser_step(twin, list(twin.aggregators.parameters()), batch_size, side, dtype, decoder)
    return counter.peak


def optimiser_step(
    denoiser: Any,
    parameters: list[nn.Parameter],
    batch_size: int,
    side: int,
    dtype: torch.dtype,
    decoder: Decoder | None,
) -> None:
    """Do a training step like all but the first, to count what it takes.

    side:    of the latent, in latent pixels
    decoder: of an objective that scores images; None: no image is decoded
    """
    kept = [[parameter.detach().clone() for parameter in parameters] for _ in range(COPIES)]
    optimiser = torch.optim.AdamW(parameters)
    for parameter in parameters:  # what every step after the first finds
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimiser.state[parameter] = {"step": torch.tensor(0.0), **moments}
    for parameter in denoiser.parameters():
        parameter.view(-1)  # counted from the start: in every later step all weights are there
    call = call_of(denoiser, side, side, batch_size, dtype=dtype)
    answer = denoiser.interface.to_latents(denoiser(**call).sample, (side, side)).float()
    (answer if decoder is None else decoder(answer)).square().mean().backward()
    optimiser.step()
    del kept


def expected(
    denoiser: EnsembleDenoiser,
    beside: list[nn.Module],
    batch_size: int,
    side: int,
    dtype: torch.dtype,
    checkpointing: bool,
    store: str | None = None,
    vae: Any = None,
    *,
    largest_maps_only: bool = False,
) -> Memory:
    """Return the memory that training this ensemble's aggregators needs.

    beside: VAE and text encoders that stay in memory
    """
    more = {"largest_maps_only": largest_maps_only}
    step = step_bytes(denoiser, batch_size, side, dtype, checkpointing, store, vae, **more)
    return Memory(step, stored_bytes(denoiser.experts), sum(map(stored_bytes, beside)))


def advice(memory: Memory, settings: LoopSettings, store: str | None) -> list[str]:
    """Return options that save memory and are still off, the most effective first.

    store: how the experts' weights are stored; None: as they are
    """
    activations = memory.step - memory.frozen
    found = []
    if not settings.gradient_checkpointing and activations > memory.frozen / 4:
        if not settings.checkpoint_large_maps:
            found.append("--checkpoint-large-maps (no activations of the stages that keep most)")
        found.append("--gradient-checkpointing (activations of one stage instead of all)")
    if settings.dtype == "float32":
        found.append("--dtype bfloat16 (half of the experts and of the activations)")
    if store is None and memory.frozen > memory.total / 4:
        found.append(
            f"--store int8 (a quarter of {memory.frozen / 1e9:.2f} GB of experts in float32, "
            "half in bfloat16), or --store cpu"
        )
    if settings.cache is None and memory.beside > memory.total / 20:
        found.append(f"--cache DIR ({memory.beside / 1e9:.2f} GB of VAE and text encoders)")
    if settings.batch_size > 1:
        found.append(f"--batch-size {settings.batch_size // 2} --accumulate 2 (the same step in two parts)")
    return found


@dataclass(frozen=True)
class TrainingPlan:
    """What a run would do; `--dry-run` stops here.

    own:    whether the ensemble was loaded for this run alone
    store:  of its experts' weights (see afa.experts.quantised)
    chosen: options that the user did not give and that have no fixed default (see choices.py) -> why they
            are as they are
    teacher: of a distillation, in which the ensemble is the student; None: of a training on images
    buckets: the size of every image; None: all are squares
    """

    settings: LoopSettings
    ensemble: Ensemble
    source: ImageSource
    resolution: int
    own: bool = True
    store: str | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    teacher: Ensemble | None = None
    buckets: Buckets | None = None

    @property
    def held_out_images(self) -> int:
        """The number of images that are never trained on."""
        return count_held_out(self.source.samples, self.settings.held_out)

    def run_facts(self) -> dict[str, Any]:
        """Return the facts of any run: images and steps."""
        return {
            "data": self.source.summary(),
            "training_images": len(self.source.samples) - self.held_out_images,
            "held_out_images": self.held_out_images,
            "resolution": self.resolution,
            "buckets": None if self.buckets is None else self.buckets.facts(),
            "steps": self.settings.steps,
            "images_a_step": self.settings.batch_size * self.settings.accumulate,
            "lr": self.settings.lr,
            "ema": self.settings.ema,
            "few_images": few_images(len(self.source.samples), self.held_out_images),
        }

    def facts(self) -> dict[str, Any]:
        """Return the facts of a run that trains aggregators, for people and for --json."""
        denoiser = self.ensemble.denoiser
        trainable = count_parameters(denoiser.aggregators)
        copies = 6  # in float32: weights, gradient, two moments, average, best
        return {
            "experts": list(denoiser.names),
            **self.run_facts(),
            "aggregator": denoiser.recipe.kind,
            "aggregator_options": dict(denoiser.recipe.options),
            "attention_up_to": denoiser.recipe.attention_up_to,
            "chosen_by_afa": {
                name: {"value": getattr(self.settings, name), "why": why} for name, why in self.chosen.items()
            },
            "fused_stages": len(denoiser.fused),
            "trainable_parameters": trainable,
            "expert_memory_gb": round(stored_bytes(denoiser.experts) / 1e9, 2),
            "aggregator_memory_gb": round(trainable * 4 * copies / 1e9, 2),
        }

    def memory(self) -> dict[str, Any]:
        """Return the expected memory of a step, and options that reduce it. Takes as long as a few steps."""
        settings, frame = self.settings, self.ensemble.frame
        dtype = getattr(torch, settings.dtype)
        beside = [] if settings.cache is not None else [frame.vae, *self.ensemble.text_encoders]
        side = self.resolution // latents_of(frame.vae).factor
        vae = frame.vae if settings.rewarded else None
        large, size = settings.checkpoint_large_maps, settings.batch_size
        some = settings.gradient_checkpointing or large
        found = expected(
            self.ensemble.denoiser, beside, size, side, dtype, some, self.store, vae, largest_maps_only=large
        )
        return {
            "expected_memory_gb": round(found.total / 1e9, 2),
            "for_less_memory": advice(found, settings, self.store),
        }

    def time(self) -> dict[str, Any]:
        """Return the expected time of the run in seconds.

        It runs two steps on random latents and measures the second; nothing of them is kept.
        """
        seconds, measurement = rehearse(self)
        measurements = self.settings.steps // self.settings.evaluate_every + 1
        return {
            "seconds_a_step": seconds,
            "seconds_a_measurement": measurement,
            "seconds": seconds * self.settings.steps + measurement * measurements,
        }


def rehearse(planned: TrainingPlan) -> tuple[float, float]:
    """Return the seconds of one optimiser step on one process, and of one held-out measurement."""
    settings, ensemble = planned.settings, planned.ensemble
    device, size = choose_device(settings.device), settings.batch_size
    ensemble.to(device)
    ensemble.frame.vae.to(device)
    denoiser = ensemble.denoiser
    settings.set_checkpointing(denoiser)
    context = make_context(settings, ensemble, device)
    noising, parameters = context.noising, list(ensemble.aggregators.parameters())
    objectives = make_objectives(context, parameters)
    conditions = Conditions(ensemble.pipeline(), denoiser, device)
    side = planned.resolution // noising.latents.factor
    captions = [sample.caption for sample in planned.source.samples[:size]]
    captions += captions[:1] * (size - len(captions))
    rng = torch.Generator().manual_seed(0)
    moments = torch.randn(size, 2 * noising.latents.channels, side, side, generator=rng)
    data = Encoded(moments, captions, torch.full((size, 6), float(planned.resolution)))
    held_out = HeldOut(data, objectives, conditions, size)

    def step() -> None:
        total = objectives.training
        rows = list(range(size))
        batch = noising.draw(data, rows, rng, total.extra_noise).to(device)
        work = Pass.of(denoiser, noising, conditions, data, rows, batch)
        torch.autograd.grad(total.sum(total.losses(work)).mean(), parameters, allow_unused=True)

    seconds = _seconds(step, device), _seconds(lambda: held_out.measure(denoiser, whole=True), device)
    return seconds[0] * settings.accumulate, seconds[1] * -(-planned.held_out_images // size)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the second run; the first one allocates buffers and chooses kernels."""
    work()
    _wait(device)
    started = time.monotonic()
    work()
    _wait(device)
    return time.monotonic() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
