"""What is judged: a picture never comes without its own caption, so that no metric can cross pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """One image and what it was asked to show.

    image: (H, W, 3) uint8. caption: its prompt. group: index of the prompt; images of one prompt share it.
    reference: a real image of the same caption, (H', W', 3) uint8, where the protocol has one.
    """

    image: NDArray[np.uint8]
    caption: str
    group: int
    reference: NDArray[np.uint8] | None = None
