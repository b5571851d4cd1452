"""A protocol: the prompts, the noise, and everything else that must be the same for every method."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.evaluation.results import Item
from afa.generation.sample import Sampling
from afa.seeds import nth_seed
from afa.training.sources.base import Skipped

TUNING_SEED = 40_000_000  # noise of the images that options are chosen on: far from any that is judged


@dataclass(frozen=True)
class Real:
    """Real images that sets are compared with. identity: what they are, in words that change when they do."""

    identity: str
    images: Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Protocol:
    """What is asked of every method.

    items: one an image, all images of a prompt together. scheduler: a name of afa.schedulers; None: the frame's own.
    metrics: judged by default; the first leads the table. first: metrics that look only at the first so many items.
    real: for distances between sets. references: the real image of each item, where prompts are captions of images.
    tuning: captions that options may be chosen on; never those that are judged.
    reward: of afa.training.rewards, where a protocol has one that its metrics do not judge by.
    training: writes captioned images to train on into a folder, where a protocol brings its own.
    left_out: references that cannot be used, with their prompts.
    """

    name: str
    items: list[Item]
    sampling: Sampling
    metrics: tuple[str, ...]
    scheduler: str | None = None
    first: Mapping[str, int] = field(default_factory=dict)
    real: Real | None = None
    references: Sequence[Callable[[], NDArray[np.uint8]]] | None = None
    tuning: Sequence[str] = ()
    training: Callable[[Path], None] | None = None
    reward: str | None = None
    left_out: Skipped = field(default_factory=Skipped)

    def facts(self) -> dict[str, Any]:
        """For the report: what was asked, without the prompts."""
        return {
            "name": self.name,
            "prompts": len({item.prompt for item in self.items}),
            "images": len(self.items),
            "scheduler": self.scheduler or "the frame's own",
            **asdict(self.sampling),
            "real_images": self.real.identity if self.real else None,
        }


@dataclass(frozen=True)
class Request:
    """What the command line says about a protocol; None: as the protocol has it."""

    prompts: int | None = None
    images_per_prompt: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    true_guidance: float | None = None
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    data: Path | None = None
    allow_outside: bool = False

    def sampling(self, steps: int, guidance: float | None = None, side: int | None = None) -> Sampling:
        """A protocol's own sampling, changed by what was asked for. guidance: None: the family's own."""
        return Sampling(
            steps if self.steps is None else self.steps,
            guidance if self.guidance is None else self.guidance,
            height=self.height or side,
            width=self.width or side,
            true_guidance=self.true_guidance,
        )

    def items(self, captions: Sequence[str], copies: int = 1) -> list[Item]:
        """`copies` images a caption (or as many as asked for), the noise of image k from seed + k."""
        captions = captions[: self.prompts]
        count = self.images_per_prompt or copies
        places = [(index, copy) for index in range(len(captions)) for copy in range(count)]
        return [Item(index, captions[index], nth_seed(self.seed, index * count + copy)) for index, copy in places]

    def data_folder(self, protocol: str, holds: str) -> Path:
        """The folder or file with a protocol's own data. Raises UserError if it was not given or is not there."""
        if self.data is None:
            raise UserError(f"protocol '{protocol}' needs {holds}; give it with --protocol-data")
        if not self.data.exists():
            raise UserError(f"--protocol-data {self.data} does not exist; protocol '{protocol}' needs {holds}")
        return self.data
