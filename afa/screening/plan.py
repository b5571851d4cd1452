"""What a screening asks: images, timesteps, noises."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Columns, Source
from afa.devices import choose_device
from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.expert import Expert
from afa.experts.load import check_names, frame_scheduler, lent_scheduler
from afa.experts.meta_model import read_outline
from afa.experts.spec import ExpertSpec
from afa.latents import latents_of
from afa.models.registry import FAMILIES
from afa.prompts import read_prompts
from afa.screening.settings import ScreenSettings
from afa.seeds import NARROW, generator, narrow
from afa.training.data import check_skipped, encode
from afa.training.measure import BANDS
from afa.training.noise import Noising


@dataclass(frozen=True)
class Probes:
    """latents (M, C, h, w): clean, as denoisers see them, on the CPU. captions (M). sizes (M, 6): SDXL's size conditions.

    digest: a hash of the images and captions.
    draws D: of noise, at every image and step. seed: of steps and noise; a point's numbers do not depend on how many points there are.
    """

    latents: Tensor
    captions: list[str]
    sizes: Tensor
    draws: int
    seed: int
    digest: str = ""

    def __len__(self) -> int:
        return len(self.captions)

    def steps(self, image: int, noising: Noising) -> Tensor:
        """One step in each band, drawn for this image: (BANDS,)."""
        rng = _stream(self.seed, image, 0)
        places = (torch.arange(BANDS) + torch.rand(BANDS, generator=rng)) / BANDS
        return (places * noising.steps).long().clamp(max=noising.steps - 1)

    def noise(self, image: int) -> Tensor:
        """(BANDS, D, C, h, w)."""
        rng = _stream(self.seed, image, 1)
        return torch.randn((BANDS, self.draws, *self.latents.shape[1:]), generator=rng)


def _stream(seed: int, image: int, which: int) -> torch.Generator:
    """A generator of its own for every seed, image and one of two uses."""
    mixed = (seed * 1_000_003 + image) * 2 + which
    return torch.Generator().manual_seed(mixed if seed < NARROW else narrow(mixed))


FEW = 50  # images, encoded without a bar
AT_ONCE = 8


def find(place: str, images: int, columns: Columns | None = None) -> Source:
    """List the first so many captioned images. Raises UserError if there are fewer than two."""
    source = open_source(place, columns, images)
    if len(source.samples) < 2:
        raise UserError(
            f"--data {place} holds {len(source.samples)} captioned image; at least 2 are needed for an interval"
        )
    return source


def encoded(
    place: str | Source, vae: Any, noising: Noising, *, images: int, draws: int, seed: int, resolution: int
) -> Probes:
    """The probes of the images that can be read; others are left out and noted in the source. resolution: of the squares, in pixels."""
    source = find(place, images) if isinstance(place, str) else place
    work = [(sample, [Crop(resolution)]) for sample in source.samples]
    vae.to(noising.device)

    def watched(rows: Any) -> Any:
        return tqdm(
            rows,
            desc="encoding images",
            unit="image",
            total=len(work),
            file=sys.stderr,
            disable=len(work) < FEW,
        )

    found = encode(work, vae, AT_ONCE, source.skipped, watched)
    batch = noising.draw(found, list(range(len(found))), generator(seed))
    vae.to("cpu")
    return Probes(batch.latents, found.captions, found.sizes, draws, seed, found.digest)


VAE_FACTOR = 8  # of all known VAEs of SD and SDXL; for denoisers that come without one


@dataclass(frozen=True)
class Plan:
    """What is found before a weight is read.

    first: the first expert, without its weights. lender: a folder whose text encoders and scheduler denoisers alone borrow. apart: why
    features cannot be fused though predictions can, in sentences. latent: (C, h, w).
    """

    settings: ScreenSettings
    specs: list[ExpertSpec]
    first: Expert
    lender: str | None
    apart: list[str]
    latent: tuple[int, int, int]
    resolution: int
    images: int
    source: Source | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's errors."""
        return (self.images, BANDS, self.settings.draws, *self.latent)

    def facts(self) -> dict[str, Any]:
        """For people and for --json."""
        bytes_each = 4 * torch.Size(self.shape).numel()
        return {
            "experts": [spec.name for spec in self.specs],
            "images": self.images,
            "resolution": self.resolution,
            "passes_each": self.images * BANDS * self.settings.draws,
            "answers_gb": round(bytes_each * len(self.specs) / 1e9, 3),
            "weight_average": self.no_average_reason() or "asked too",
        }

    def no_average_reason(self) -> str | None:
        """Why the weight average is not asked; None if it is."""
        if self.settings.no_average:
            return "left out by --no-average"
        if self.settings.prompts is not None:
            return "left out: without images nobody knows who is right"
        return f"cannot be made: {self.apart[0]}" if self.apart else None


def plan(settings: ScreenSettings) -> Plan:
    """Read files' headers and list the data. Raises UserError for whatever would fail later."""
    specs = [ExpertSpec.parse(text, settings.prediction_type) for text in settings.experts]
    check_names(specs)
    experts = [read_outline(spec, settings.config).expert for spec in specs]
    lender = _lender(experts, settings.frame)
    reasons = mismatches(experts, features=False)
    if reasons:
        raise UserError("; ".join(reasons) + f". Compare them with: afa inspect {' '.join(settings.experts)}")
    if settings.device is not None:
        choose_device(settings.device)
    columns = Columns(settings.image_column, settings.caption_column, settings.allow_outside)
    source = None if settings.data is None else find(settings.data, settings.images, columns)
    if source is not None:
        check_skipped(source, settings.max_skipped)
    images = _prompts(settings) if source is None else len(source.samples)
    return Plan(
        settings, specs, experts[0], lender, mismatches(experts), *_size(settings, experts[0]), images, source
    )


def _lender(experts: Sequence[Expert], frame: str | None) -> str | None:
    """Whose folder denoisers alone borrow from: the frame, or the first expert that is a pipeline's folder; they are then compared as if they had its text.

    Raises UserError if some are, and there is none.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if not bare:
        return frame
    whole = next((expert for expert in experts if expert.text_encoders), None)
    folder = (
        None
        if whole is None or whole.located is None or whole.located.single_file
        else str(whole.located.path)
    )
    for expert in bare if whole is not None else ():
        expert.text_encoders, expert.tokenizers = list(whole.text_encoders), list(whole.tokenizers)
    place = frame or folder
    lent = frame_scheduler(place) if place is not None else None if whole is None else whole.scheduler
    for expert in bare if lent is not None else ():
        expert.scheduler = lent_scheduler(expert, lent)
    if frame is None and folder is None:
        raise UserError(
            f"expert '{bare[0].name}' is a denoiser alone; name a pipeline's folder that lends it text encoders and scheduler: --frame FOLDER"
        )
    return place


def _prompts(settings: ScreenSettings) -> int:
    """How many there are to draw. Raises UserError for fewer than two."""
    found = min(settings.images, len(read_prompts(Path(str(settings.prompts)))))
    if found < 2:
        raise UserError(f"--prompts {settings.prompts} holds {found} prompt; at least 2 are needed")
    return found


def _size(settings: ScreenSettings, expert: Expert) -> tuple[tuple[int, int, int], int]:
    """Of latents (C, h, w), and of images in pixels. Raises UserError for a resolution that no latent has."""
    call, config = FAMILIES[expert.family].call, expert.model.config
    factor = VAE_FACTOR if expert.vae is None else latents_of(expert.vae).factor
    found = call.side(config)
    side = found if isinstance(found, int | None) else max(found)
    if not settings.resolution and not side:
        raise UserError(f"'{expert.name}' has no size of its own (sample_size); give --resolution")
    resolution = settings.resolution or side * factor
    multiple = factor * call.patch
    if resolution % multiple:
        near = max(1, round(resolution / multiple)) * multiple
        raise UserError(
            f"--resolution {resolution} is not a multiple of {multiple} pixels; {near} is the nearest"
        )
    return (call.latent_channels(config), resolution // factor, resolution // factor), resolution
