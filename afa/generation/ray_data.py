"""Drawing with Ray Data: a class for `map_batches`, whose actors hold an ensemble each. Imports no ray."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afa.devices import process_device
from afa.errors import UserError
from afa.generation.drawing import draw_missing
from afa.generation.prompt_loras import PromptLoras
from afa.generation.ready import made_of, make_drawing, ready_ensemble
from afa.generation.settings import GenerateSettings
from afa.generation.speed import at_level

# Options about files, about several images of a prompt, and about processes: Ray has its own.
NOT_HERE = (
    *("output", "prompt", "prompts", "images_per_prompt", "seed", "shard", "pack", "pack_size", "parallel"),
    *("grid", "weights", "lora_dir", "json"),
)
COLUMNS = ("text", "seed")


class DrawImages:
    """Draws the rows of a data set: columns `text` (the prompt) and `seed` -> the same and `image`.

    image: the PNG, which says how it was made, as bytes; the picture that `afa generate` draws of that seed
    """

    def __init__(self, sources: str | Sequence[str], **options: Any) -> None:
        """Load an ensemble, or experts.

        sources: as SOURCE of `afa generate`
        options: of GenerateSettings; `batch_size` is how many are drawn at once, of the rows of a batch
        Raises UserError.
        """
        refused = [name for name in options if name in NOT_HERE]
        if refused:
            raise UserError(
                f"{refused[0]} is an option of afa generate alone: here each row has its "
                "prompt and seed, and Ray writes the files; leave it out"
            )
        sources = [sources] if isinstance(sources, str) else list(sources)
        settings = GenerateSettings(sources=sources, output="", prompt=["-"], **options)
        self.settings = at_level(settings)
        self.files, self.regions = made_of(self.settings), self.settings.read_regions()
        device = process_device(self.settings.device)
        self.loras = PromptLoras(None, [])
        self.ensemble = ready_ensemble(self.settings, [self.settings], self.loras, [], device)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Draw one batch. Raises UserError for a batch without the columns."""
        missing = [name for name in COLUMNS if name not in batch]
        if missing:
            raise UserError(
                f"the data set has no column '{missing[0]}' (it has {', '.join(batch)}); each row needs its "
                "prompt, text, and its seed"
            )
        asked = [(str(text), int(seed)) for text, seed in zip(batch["text"], batch["seed"], strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(self.settings, output=folder)
            drawing = make_drawing(settings, self.ensemble, asked, self.files, self.regions, self.loras)
            draw_missing(drawing, self.ensemble, self.loras, tqdm(disable=True))
            pictures = np.empty(len(asked), object)
            pictures[:] = [image.read() for image in drawing.images]
        return {**batch, "image": pictures}
