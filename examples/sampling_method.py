"""A sampling-time method in a diffusers pipeline: combine experts without any training.

    python examples/sampling_method.py

Draws one prompt with three methods that need no training. `afa generate --help` lists all methods and their options.
"""

import torch

from afa import Ensemble
from afa.sampling.registry import make_sampler

PROMPT = "a red star left of a blue ring on a dotted mint background"
METHODS = {
    "noise_average": {"weights": [1, 1, 2]},
    "timestep_experts": {"table": "1000-500:curves,500-0:patterns"},
    "magicfusion": {"general": "patterns"},
}


def main() -> None:
    ensemble = Ensemble.from_experts(["demo:curves", "demo:angles", "demo:patterns"])
    for method, options in METHODS.items():
        sampler = make_sampler(method, ensemble, **options)
        for part in sampler.guided:  # methods that must know how strong guidance is
            part.guidance = 3.0
        pipe = sampler.pipeline  # stock, with the method in the denoiser's place
        pipe(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0].save(f"{method}.png")
        print(f"drew {method}.png with {type(pipe).__name__}")


if __name__ == "__main__":
    main()
