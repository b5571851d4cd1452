"""Protocols: prompts, noise, steps, guidance and size, the same for all methods; and their registry."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.data.images import UNREADABLE, reason, unreadable
from afa.data.registry import open_source
from afa.data.sources import Columns, Sample, Skipped
from afa.errors import UserError, unknown
from afa.evaluation.results import Item
from afa.files import given_name
from afa.fingerprint import digest
from afa.images import read_pixels
from afa.lazy import load
from afa.prompts import read_prompts
from afa.sampling.sample import Sampling
from afa.seeds import nth_seed

TUNING_SEED = 40_000_000  # noise of the images that options are chosen on: far from any that is judged


@dataclass(frozen=True)
class Real:
    """Real images that sets are compared with.

    identity: text that changes when the images change
    """

    identity: str
    images: Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Protocol:
    """What every method is asked to draw, and how it is judged.

    items:      one per image; images of a prompt are consecutive
    scheduler:  a name of afa.schedulers; None: the frame's own
    metrics:    the default metrics; the first leads the table
    first:      for some metrics, how many of the first items they judge
    real:       real images for distances between sets
    references: the real image of each item, if prompts are captions of images
    tuning:     captions for choosing options; they are never judged
    reward:     one of afa.training.reward_objectives that is not one of the metrics
    training:   writes captioned training images into a folder, if the protocol has its own
    left_out:   references that cannot be used, with their prompts
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
        """Return the protocol's settings for the report, without the prompts."""
        return {
            "name": self.name,
            "prompts": len({item.prompt for item in self.items}),
            "images": len(self.items),
            "scheduler": self.scheduler or "the frame's own",
            **self.sampling.record(),
            "real_images": self.real.identity if self.real else None,
        }


@dataclass(frozen=True)
class ProtocolOptions:
    """The command line's options of a protocol; None: the protocol's own."""

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
        """Return a protocol's sampling, changed by the command line's options.

        guidance: None: the family's own
        """
        return Sampling(
            steps if self.steps is None else self.steps,
            guidance if self.guidance is None else self.guidance,
            height=self.height or side,
            width=self.width or side,
            true_guidance=self.true_guidance,
        )

    def items(self, captions: Sequence[str], copies: int = 1) -> list[Item]:
        """Return `copies` images per caption (or as many as asked for); image k has the noise of seed + k."""
        captions = captions[: self.prompts]
        count = self.images_per_prompt or copies
        places = [(index, copy) for index in range(len(captions)) for copy in range(count)]
        return [
            Item(index, captions[index], nth_seed(self.seed, index * count + copy)) for index, copy in places
        ]

    def data_folder(self, protocol: str, holds: str) -> Path:
        """Return the folder or file of a protocol's data.

        Raises UserError if it is not given or not there.
        """
        if self.data is None:
            raise UserError(f"protocol '{protocol}' needs {holds}; give it with --protocol-data")
        if not self.data.exists():
            raise UserError(
                f"--protocol-data {self.data} does not exist; protocol '{protocol}' needs {holds}"
            )
        return self.data


STEPS = 50


def protocol(source: Path, request: ProtocolOptions) -> Protocol:
    """Make a protocol of a user's prompts or captioned images: 50 steps and the family's guidance by default.

    All references are decoded here, so that broken ones are left out before anything is drawn.
    Raises UserError if there are no prompts.
    """
    sampling = request.sampling(STEPS)
    if source.is_file():
        items = request.items(read_prompts(source))
        metrics = ("imagereward", "clip_t", "aesthetic")
        return Protocol(source.stem, items, sampling, metrics=metrics, scheduler=request.scheduler)
    found = open_source(str(source), Columns(allow_outside=request.allow_outside))
    samples = []
    for sample, error in zip(found.samples, unreadable(found.samples), strict=True):
        if error is None:
            samples.append(sample)
        else:
            found.skipped.add(reason(error), sample.name)
    if len(samples) < 2:
        raise UserError(
            f"--protocol {source} has {len(samples)} captioned images that can be read; "
            f"{found.skipped.summary()}"
        )
    items = request.items([sample.caption for sample in samples])
    listed = digest([[sample.name, sample.caption, sample.mark] for sample in samples])
    return Protocol(
        given_name(source),
        items,
        sampling,
        metrics=("fid", "clip_t", "clip_i"),
        scheduler=request.scheduler,
        real=Real(
            json.dumps({"images": len(samples), "list": listed}),
            lambda: (sample_image(sample) for sample in samples),
        ),
        references=[functools.partial(sample_image, samples[item.prompt]) for item in items],
        left_out=found.skipped,
    )


def sample_image(sample: Sample) -> np.ndarray:
    """Return an image (H, W, 3) uint8. Raises UserError if it cannot be read."""
    try:
        return read_pixels(sample.read(), sample.name)
    except UNREADABLE as error:
        raise UserError(
            f"image {sample.name} cannot be read ({error}); mend it, or leave it out of the list"
        ) from None


@dataclass(frozen=True)
class ProtocolEntry:
    """One protocol.

    make: "module:function" with function(ProtocolOptions) -> Protocol, imported when it is asked for
    help: one line for `--protocol list` and the docs
    """

    make: str
    help: str


PROTOCOLS = {
    "scenes": ProtocolEntry(
        "afa.demo.data:protocol",
        "320 mixed scenes of the far embedded world, one image each, 20 steps, 64 px",
    ),
    "near": ProtocolEntry(
        "afa.demo.data:near_protocol",
        "320 mixed scenes of the near embedded world, one image each, 20 steps, 64 px",
    ),
    "coco2017": ProtocolEntry(
        "afa.evaluation.public_protocols:coco2017",
        "captions of COCO 2017's training images, with the images as references; your own copy of them",
    ),
    "drawbench": ProtocolEntry(
        "afa.evaluation.public_protocols:drawbench",
        "DrawBench: 200 prompts of 11 kinds, four images each; your own copy of them",
    ),
}


def make_protocol(name: str, request: ProtocolOptions) -> Protocol:
    """Return a protocol by name, or of a user's file of prompts or folder of captioned images.

    Raises UserError for a name that is neither, or if data are missing.
    """
    if name in PROTOCOLS:
        made: Protocol = load(PROTOCOLS[name].make)(request)
        return made
    if not Path(name).exists():
        raise UserError(
            unknown(name, PROTOCOLS, "protocol (or file of prompts, or folder of captioned images)")
        )

    return protocol(Path(name), request)
