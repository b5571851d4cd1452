"""Training in Python: the command's own run, and a loop of your own.

    python examples/train.py

A few steps on few images, enough to see that it works. For your own images give their folder, and leave out the sizes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from afa import Ensemble
from afa.demo.draw import draw
from afa.training import TrainSettings, train

EXPERTS = ["demo:curves", "demo:angles"]
DATA = Path("images")  # metadata.jsonl: {"file_name": "00000.png", "text": "caption"} in each line


def by_command() -> None:
    """All that `afa train` does: resumes, holds images out, keeps the best average, writes what it measured."""
    record = train(TrainSettings(experts=EXPERTS, data=str(DATA), output="trained", steps=4, batch_size=4, held_out=4, hidden=8, heads=2))
    print("held-out loss:", {name: round(loss["value"], 4) for name, loss in record["held_out_loss"].items()})


def by_hand() -> None:
    """The denoiser is a module like any other; only the aggregators have gradients."""
    ensemble = Ensemble.load("trained")
    pipe = ensemble.pipeline()
    optimizer = torch.optim.AdamW(ensemble.aggregators.parameters(), lr=1e-3)
    lines = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text().splitlines()][:4]
    pixels = np.stack([np.asarray(Image.open(DATA / line["file_name"]).convert("RGB")) for line in lines])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        embeds, _ = pipe.encode_prompt([line["text"] for line in lines], "cpu", 1, False)
    scheduler, random = pipe.scheduler, torch.Generator().manual_seed(0)
    noise, timesteps = torch.randn(latents.shape, generator=random), torch.randint(0, 1000, (len(latents),), generator=random)
    for step in range(4):  # the same noise in each step, so that the loss can be seen to fall
        predicted = ensemble.denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
        target = scheduler.get_velocity(latents, noise, timesteps)  # these experts predict v
        loss = (predicted - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    ensemble.save("trained-on")


if __name__ == "__main__":
    draw(DATA, "mixed", count=20, seed=0)
    by_command()
    by_hand()
