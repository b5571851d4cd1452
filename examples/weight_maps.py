"""Reading weight maps: which expert drew what, when, and what happens without it.

    python examples/weight_maps.py
"""

import numpy as np
import torch
from PIL import Image

from afa import Ensemble, record_weights, scale_weights
from afa.pictures import conditional, mean_over_stages, overlay

PROMPT = "a red star left of a blue ring on a dotted mint background"


def main() -> None:
    ensemble = Ensemble.load("demo:ensemble")
    pipe = ensemble.pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Image.Image:
        return pipe(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0]

    with record_weights(ensemble.denoiser) as maps:
        image = draw()
    image.save("image.png")

    # By stage: (passes, batch, experts, height, width). With guidance, the last image of the batch is the one with the prompt.
    weights = maps.stage("OUT03")[:, -1]
    for name, share, first, last in zip(maps.experts, weights.mean((0, 2, 3)), weights[0].mean((1, 2)), weights[-1].mean((1, 2)), strict=True):
        print(f"{name:<9} mean weight {share:.2f}, first step {first:.2f}, last step {last:.2f}")

    # The image, tinted by who weighs where: the mean over all stages at the last step, brought to the image's size.
    shares = mean_over_stages(conditional(maps, images=1)[-1], (image.height, image.width))[0]
    Image.fromarray(overlay(np.asarray(image), shares.numpy())).save("who.png")

    # The same noise with one expert off: the others' weights are scaled to sum to 1 again.
    with scale_weights(ensemble.denoiser, {"curves": 0}):
        without = draw()
    without.save("without-curves.png")
    change = np.sqrt(np.mean((np.asarray(image, float) - np.asarray(without, float)) ** 2))
    print(f"without curves the image changes by {change:.0f} levels of 255 (RMSE)")


if __name__ == "__main__":
    main()
