"""The weight maps of pictures, kept so that looking at another step or stage draws nothing anew."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from afa.denoiser.hooks import WeightMaps
from afa.errors import UserError
from afa.pictures import conditional, mean_over_stages

ROOM = 256 * 2**20  # bytes of maps kept, of the latest pictures


@dataclass(frozen=True)
class Kept:
    """One picture and the weights it was made with.

    image (H, W, 3) uint8. timesteps: of each pass. maps: by stage, (passes, N, h, w) float16, the passes with the prompt.
    """

    image: NDArray[np.uint8]
    experts: tuple[str, ...]
    timesteps: tuple[float, ...]
    maps: dict[str, NDArray[np.float16]]

    @classmethod
    def of(cls, image: NDArray[np.uint8], recorded: WeightMaps) -> "Kept":
        """Of the only image of a batch."""
        passes = [{name: weights[0] for name, weights in one.items()} for one in conditional(recorded, 1)]
        maps = {name: torch.stack([one[name] for one in passes]).half().numpy() for name in passes[0]}
        return cls(image, tuple(recorded.experts), tuple(recorded.timesteps), maps)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.image.nbytes + sum(weights.nbytes for weights in self.maps.values())

    def look(self, step: int, stage: str) -> NDArray[np.float32]:
        """The weights at one step, counted from 1, and stage; 0 and "": the mean over all. -> (N, H, W) in the image's size, convex.

        Raises UserError for a step or stage that the picture has not.
        """
        if stage and stage not in self.maps:
            raise UserError(f"this picture has no weights at stage '{stage}'; it has them at {', '.join(self.maps)}")
        if not 0 <= step <= len(self.timesteps):
            raise UserError(f"this picture has {len(self.timesteps)} steps, and step {step} is asked for; 0 is the mean over all")
        chosen = {name: weights for name, weights in self.maps.items() if stage in ("", name)}
        at = {name: torch.from_numpy(self._at(weights, step))[None] for name, weights in chosen.items()}
        height, width = self.image.shape[:2]
        return np.asarray(mean_over_stages(at, (height, width))[0].numpy())

    def _at(self, weights: NDArray[np.float16], step: int) -> NDArray[np.float32]:
        found = weights.astype(np.float32).mean(0) if step == 0 else weights[step - 1].astype(np.float32)
        return np.asarray(found, np.float32)


class Shelf:
    """Kept maps by the picture's file name; the oldest make room for new ones."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put(self, name: str, kept: Kept) -> None:
        """Keep one; the latest stays however large it is."""
        self._kept.pop(name, None)
        self._kept[name] = kept
        while len(self._kept) > 1 and sum(one.size for one in self._kept.values()) > self.room:
            self._kept.popitem(last=False)

    def get(self, name: str) -> Kept:
        """Raises UserError for a picture whose maps are not kept, or that has none."""
        try:
            return self._kept[name]
        except KeyError:
            raise UserError(f"there are no weight maps of {name[:80]} here; make the picture again, with a method that weighs experts") from None
