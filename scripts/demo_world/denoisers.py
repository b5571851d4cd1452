"""The base U-Net, trained on all domains, and the experts, each trained further on its own domain."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.demo_world.fit import Schedule, fit, mixed_precision
from scripts.demo_world.parts import token_ids
from scripts.demo_world.worlds import WorldPlan

CAPTION_DROPOUT = 0.1


@dataclass
class Parts:
    """The frozen parts that all denoisers share."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction, whose loss has weight at high noise too."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@torch.no_grad()
def training_set(
    plan: WorldPlan, domain: str, count: int, seed: int, parts: Parts, work: Path
) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 16, 16) of unit variance and token ids (n, 24) of a domain's scenes."""
    file = work / f"latents-{domain.replace(' ', '-')}-{count}.pt"
    if file.exists():
        latents, ids = torch.load(file, weights_only=True)
        return latents, ids
    scenes = plan.world.sample(domain, count, seed)
    images = plan.draw(scenes, seed)
    latents = torch.cat(
        [parts.vae.encode(batch.float() / 127.5 - 1).latent_dist.mode() for batch in images.split(100)]
    )
    latents = latents * parts.vae.config["scaling_factor"]
    ids = token_ids(parts.tokenizer, [scene.caption for scene in scenes])
    torch.save((latents, ids), file)
    return latents, ids


def train_denoiser(
    name: str,
    unet: nn.Module,
    text_encoder: nn.Module,
    data: tuple[Tensor, Tensor],
    null: Tensor,
    schedule: Schedule,
    work: Path,
) -> None:
    """Train a U-Net on latents and captions; also the text encoder, if its parameters require gradients."""
    latents, ids = data
    noises = scheduler()
    tunes_text = any(parameter.requires_grad for parameter in text_encoder.parameters())
    if not tunes_text:
        with torch.no_grad():
            states = torch.cat([text_encoder(batch).last_hidden_state for batch in ids.split(500)])

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (schedule.batch,), generator=rng)
        dropped = torch.rand(schedule.batch, generator=rng) < CAPTION_DROPOUT
        if tunes_text:
            text = text_encoder(torch.where(dropped[:, None], null, ids[chosen])).last_hidden_state
        else:
            text = torch.where(dropped[:, None, None], text_encoder(null).last_hidden_state, states[chosen])
        clean = latents[chosen]
        times = torch.randint(1000, (schedule.batch,), generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        noisy, target = noises.add_noise(clean, noise, times), noises.get_velocity(clean, noise, times)
        with mixed_precision():
            prediction = unet(noisy, times, text).sample
        return nn.functional.mse_loss(prediction.float(), target)

    trained = nn.ModuleDict({"unet": unet, **({"text_encoder": text_encoder} if tunes_text else {})})
    fit(name, trained, loss, schedule, work)
    trained.eval().requires_grad_(False)
