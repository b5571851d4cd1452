"""The probes of a screening (images, timesteps, noises), and the checks before any weights are read."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Columns, ImageSource
from afa.devices import choose_device
from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.description import ExpertDescription, describe_expert
from afa.experts.donor import DonorSpec, describe_donor, files_of, lacks
from afa.experts.expert import Expert
from afa.experts.lending import donor_scheduler
from afa.experts.load import check_names
from afa.experts.spec import ExpertSpec
from afa.experts.text_names import text_encoders_beside
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
    """The images at which experts predict, with their timesteps and noises.

    latents:  (M, C, h, w) clean and scaled, on the CPU
    captions: (M)
    sizes:    (M, 6) SDXL's size conditions
    draws:    D noises at every image and timestep
    seed:     of timesteps and noise; those of an image do not depend on the number of images
    digest:   hash of the images and captions
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
        """Draw one timestep in each band for one image: (BANDS,)."""
        rng = _stream(self.seed, image, 0)
        places = (torch.arange(BANDS) + torch.rand(BANDS, generator=rng)) / BANDS
        return (places * noising.steps).long().clamp(max=noising.steps - 1)

    def noise(self, image: int) -> Tensor:
        """Draw the noises of one image: (BANDS, D, C, h, w)."""
        rng = _stream(self.seed, image, 1)
        return torch.randn((BANDS, self.draws, *self.latents.shape[1:]), generator=rng)


def _stream(seed: int, image: int, which: int) -> torch.Generator:
    """Return a generator for a seed, an image and one of two uses."""
    mixed = (seed * 1_000_003 + image) * 2 + which
    return torch.Generator().manual_seed(mixed if seed < NARROW else narrow(mixed))


FEW = 50  # fewer images are encoded without a progress bar
AT_ONCE = 8  # images that are encoded in one batch


def find(place: str, images: int, columns: Columns | None = None) -> ImageSource:
    """List the first `images` captioned images. Raises UserError if there are fewer than two."""
    source = open_source(place, columns, images)
    if len(source.samples) < 2:
        raise UserError(
            f"--data {place} holds {len(source.samples)} captioned image;"
            " at least 2 are needed for an interval"
        )
    return source


def encoded(
    place: str | ImageSource,
    vae: Any,
    noising: Noising,
    *,
    images: int,
    draws: int,
    seed: int,
    resolution: int,
) -> Probes:
    """Encode the images; unreadable images are left out and noted in the source.

    resolution: side of the cropped squares in pixels
    """
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
class ScreenPlan:
    """What is known before any weights are read.

    settings:     as given
    specs:        of the experts
    descriptions: of the experts, as their files describe them
    first:        the first expert, without its weights
    donor:        whose text encoders and scheduler are used for bare denoisers; None: none needed
    apart:        why the experts' features cannot be fused, although their predictions can be compared
    latent:       (C, h, w)
    resolution:   side of the images in pixels
    images:       number of images
    source:       of captioned images; None: the experts sample them from prompts
    """

    settings: ScreenSettings
    specs: list[ExpertSpec]
    descriptions: list[ExpertDescription]
    first: Expert
    donor: DonorSpec | None
    apart: list[str]
    latent: tuple[int, int, int]
    resolution: int
    images: int
    source: ImageSource | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one expert's errors: (M, BANDS, D, C, h, w)."""
        return (self.images, BANDS, self.settings.draws, *self.latent)

    def facts(self) -> dict[str, Any]:
        """Return what --dry-run prints."""
        bytes_each = 4 * torch.Size(self.shape).numel()
        return {
            "experts": [spec.name for spec in self.specs],
            "images": self.images,
            "resolution": self.resolution,
            "passes_each": self.images * BANDS * self.settings.draws,
            "answers_gb": round(bytes_each * len(self.specs) / 1e9, 3),
            "weight_average": self.no_average_reason() or "screened too",
        }

    def no_average_reason(self) -> str | None:
        """Return why the weight average is not screened; None if it is."""
        if self.settings.no_average:
            return "left out by --no-average"
        if self.settings.prompts is not None:
            return "left out: without captioned images it is not known which expert is right"
        return f"cannot be made: {self.apart[0]}" if self.apart else None


def plan(settings: ScreenSettings) -> ScreenPlan:
    """Read the headers of weight files and list the data. Raises UserError for what would fail later."""
    specs = [ExpertSpec.parse(text, settings.prediction_type) for text in settings.experts]
    check_names(specs)
    descriptions = [describe_expert(spec, settings.config) for spec in specs]
    # Copies: the descriptions stay without what is borrowed.
    experts = [replace(description.expert) for description in descriptions]
    donor = _donor(experts, settings)
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
    return ScreenPlan(
        settings,
        specs,
        descriptions,
        experts[0],
        donor,
        mismatches(experts),
        *_size(settings, experts[0]),
        images,
        source,
    )


def _donor(experts: Sequence[Expert], settings: ScreenSettings) -> DonorSpec | None:
    """Return what lends text encoders and scheduler to bare denoisers; None if it is not needed.

    It is what the user gives, or the first expert that is a pipeline's folder. The bare denoisers get its
    text encoders and tokenizers for the comparison. Raises UserError if a bare denoiser has no donor, or its
    donor lacks parts.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    given = DonorSpec(settings.frame, tuple(settings.text_encoder or ()), settings.vae, files_of(bare))
    if not bare:
        return given or None
    whole = next((expert for expert in experts if expert.text_encoders), None)
    if given or (whole is None and any(map(text_encoders_beside, given.files))):
        found = describe_donor(given, bare[0])
        lender = found.expert([component.model for component in found.text_encoders])
    elif whole is None or whole.located is None or whole.located.single_file:
        raise UserError(lacks(bare[0]))
    else:
        given, lender = DonorSpec(str(whole.located.path)), whole
    for expert in bare:
        texts = whole or lender
        expert.text_encoders, expert.tokenizers = list(texts.text_encoders), list(texts.tokenizers)
        expert.scheduler = donor_scheduler(expert, lender.scheduler)
    return given


def _prompts(settings: ScreenSettings) -> int:
    """Return the number of prompts to sample. Raises UserError for fewer than two."""
    found = min(settings.images, len(read_prompts(Path(str(settings.prompts)))))
    if found < 2:
        raise UserError(f"--prompts {settings.prompts} holds {found} prompt; at least 2 are needed")
    return found


def _size(settings: ScreenSettings, expert: Expert) -> tuple[tuple[int, int, int], int]:
    """Return the shape of latents (C, h, w) and the side of images in pixels.

    Raises UserError for a resolution that the VAE and the denoiser cannot represent.
    """
    interface, config = FAMILIES[expert.family].interface, expert.model.config
    factor = VAE_FACTOR if expert.vae is None else latents_of(expert.vae).factor
    found = interface.sample_size(config)
    side = found if isinstance(found, int | None) else max(found)
    if not settings.resolution and not side:
        raise UserError(f"'{expert.name}' has no size of its own (sample_size); give --resolution")
    resolution = settings.resolution or side * factor
    multiple = factor * interface.patch
    if resolution % multiple:
        near = max(1, round(resolution / multiple)) * multiple
        raise UserError(
            f"--resolution {resolution} is not a multiple of {multiple} pixels; {near} is the nearest"
        )
    return (interface.latent_channels(config), resolution // factor, resolution // factor), resolution
