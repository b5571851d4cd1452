"""What a training run would do, before it does it."""

from dataclasses import dataclass
from typing import Any

import torch

from afa.aggregators.table import count_parameters
from afa.ensemble import Ensemble
from afa.experts.storage import stored_bytes
from afa.latents import latents_of
from afa.training.estimate import advice, expected
from afa.training.settings import LoopSettings
from afa.training.sources.base import Source


@dataclass(frozen=True)
class Plan:
    """What a run would do; `--dry-run` stops here. own: the ensemble was loaded for this run alone. store: of its experts' weights."""

    settings: LoopSettings
    ensemble: Ensemble
    source: Source
    resolution: int
    own: bool = True
    store: str | None = None

    def facts(self) -> dict[str, Any]:
        """For people and for --json."""
        denoiser, settings = self.ensemble.denoiser, self.settings
        held_out = min(settings.held_out, len(self.source.samples) // 5)
        trainable = count_parameters(denoiser.aggregators)
        return {
            "experts": list(denoiser.names),
            "data": self.source.summary(),
            "training_images": len(self.source.samples) - held_out,
            "held_out_images": held_out,
            "resolution": self.resolution,
            "fused_stages": len(denoiser.fused),
            "trainable_parameters": trainable,
            "expert_memory_gb": round(stored_bytes(denoiser.experts) / 1e9, 2),
            "aggregator_memory_gb": round(trainable * 4 * 6 / 1e9, 2),  # weights, gradient, two moments, average, best
            "steps": settings.steps,
            "images_a_step": settings.batch_size * settings.accumulate,
        }

    def memory(self) -> dict[str, Any]:
        """What a step is expected to need, and what would make it less; takes as long as a few steps."""
        settings, frame = self.settings, self.ensemble.frame
        dtype = getattr(torch, settings.dtype)
        beside = [] if settings.cache is not None else [frame.vae, *self.ensemble.text_encoders]
        side = self.resolution // latents_of(frame.vae).factor
        vae = frame.vae if settings.rewarded else None
        checkpointing, size = settings.gradient_checkpointing, settings.batch_size
        found = expected(self.ensemble.denoiser, beside, size, side, dtype, checkpointing, self.store, vae)
        less = advice(found, checkpointing=checkpointing, dtype=dtype, cached=not beside, batch_size=size, store=self.store)
        return {"expected_memory_gb": round(found.total / 1e9, 2), "for_less_memory": less}

    def time(self) -> dict[str, Any]:
        """What the run is expected to take, by two steps of it on random latents, the second measured; nothing is kept of them."""
        from afa.training.rehearsal import rehearse

        seconds, measurement = rehearse(self)
        measurements = self.settings.steps // self.settings.evaluate_every + 1
        return {"seconds_a_step": seconds, "seconds_a_measurement": measurement, "seconds": seconds * self.settings.steps + measurement * measurements}
