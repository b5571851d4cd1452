"""From checkpoints to an ensemble: combine, save, load, draw.

    python examples/ensemble.py [EXPERT …]

An expert is a diffusers folder, a .safetensors or .gguf file, or org/name@revision. Without any, three small models that come with afa are combined.
"""

import sys

import torch

from afa import Ensemble

EXPERTS = sys.argv[1:] or ["demo:curves", "demo:angles", "demo:patterns"]
PROMPT = "a red star left of a blue ring on a dotted mint background"


def main() -> None:
    # Untrained aggregators give the mean of the experts' features. `afa train`, or examples/train.py, trains them.
    ensemble = Ensemble.from_experts(EXPERTS, aggregator="stitch", hidden=16, heads=2, depth=1)
    ensemble.save("untrained")  # the aggregators, and where the experts are; the experts are not copied
    print("combined", ", ".join(ensemble.names), "at", ", ".join(ensemble.denoiser.fused))

    # What is saved loads as what it was: here the trained ensemble that comes with afa.
    for source, picture in (("untrained", "untrained.png"), ("demo:ensemble", "trained.png")):
        pipe = Ensemble.load(source).pipeline()  # a stock diffusers pipeline
        pipe.set_progress_bar_config(disable=True)
        pipe(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0].save(picture)
        print("drew", picture)


if __name__ == "__main__":
    main()
