"""Load one expert at a time, compute its predictions at the probes, and keep their errors on disk."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from afa.aggregators.registry import Recipe
from afa.data.sources import METADATA
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.schedule import Schedule, conversion
from afa.devices import free_memory
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.donor import DonorSpec, lacks
from afa.experts.expert import Expert, load_finite_vae
from afa.experts.lending import borrow_components, load_donor
from afa.experts.load import load_experts
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.experts.vae import load_vae
from afa.files import read_arrays, replacing, write_atomically
from afa.frame import Frame
from afa.models.registry import FAMILIES
from afa.prompts import read_prompts
from afa.sampling.image_files import ImageFile, draw
from afa.sampling.sample import PipelineSampler, Request, Sampling, settled
from afa.screening.plan import Probes
from afa.screening.settings import ScreenSettings
from afa.seeds import nth_seed
from afa.stages.stage import Stage, StageContext
from afa.store import RowStore
from afa.text_encoder import width_of
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass


@dataclass(frozen=True)
class SharedParts:
    """What all experts share while they are compared.

    vae:       of the first expert
    scheduler: of the first expert; errors are in its kind of prediction
    donor:     whose text encoders and scheduler are used for bare denoisers; None: none needed
    config:    architecture of single files; None: detected
    dtype:     of the models
    device:    on which they run
    """

    vae: Any
    scheduler: Any
    donor: DonorSpec | None
    config: str | None
    dtype: torch.dtype
    device: torch.device

    def load(self, spec: ExpertSpec) -> Ensemble:
        """Load one expert; its predictions are converted to the scheduler's kind of prediction."""
        expert = load_single(spec, self.donor, self.dtype, self.config)
        kind = conversion(Schedule.of(expert.scheduler), Schedule.of(self.scheduler))
        widths = [width_of(encoder) for encoder in expert.text_encoders]
        maker = FAMILIES[expert.family].denoiser
        try:
            denoiser = maker([expert.model], [expert.name], Recipe("mean"), "out", widths, [kind])
        except ValueError as error:
            raise UserError(str(error)) from None
        return Ensemble([expert], denoiser, Frame([expert], donor=expert.donor)).to(self.device)

    def conditions(self, ensemble: Ensemble) -> Conditions:
        """Return the prompt encoding of an expert, by its own text encoders."""
        return Conditions(ensemble.pipeline(vae=self.vae), ensemble.denoiser, self.device)


def load_shared_parts(
    first: Expert,
    donor: DonorSpec | None,
    vae: str | None,
    config: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> SharedParts:  # fmt: skip
    """Load what all experts share.

    first: the first expert, without its weights (see experts/description.py)
    donor: see SharedParts
    vae:   place of a VAE that replaces the first expert's; None: its own
    Raises UserError if there is no VAE or no scheduler.
    """
    borrowed = None if first.scheduler is not None else load_donor(_given(first, donor), first, dtype)
    scheduler = first.scheduler if borrowed is None else borrowed.scheduler
    if vae is not None:
        return SharedParts(
            load_vae(locate(ExpertSpec("vae", vae)), config, dtype, like=first),
            scheduler,
            donor,
            config,
            dtype,
            device,
        )
    if first.vae_component is not None:
        found = load_finite_vae(first.vae_component, dtype)
    else:
        found = (borrowed or load_donor(_given(first, donor), first, dtype)).load_vae()
    return SharedParts(found, scheduler, donor, config, dtype, device)


def _given(expert: Expert, donor: DonorSpec | None) -> DonorSpec:
    if donor is None:
        raise UserError(lacks(expert))
    return donor


def load_single(spec: ExpertSpec, donor: DonorSpec | None, dtype: torch.dtype, config: str | None) -> Expert:
    """Load one expert. Raises UserError for a bare denoiser without a donor."""
    (expert,) = load_experts([spec], dtype, config)
    if not expert.text_encoders:
        borrow_components([expert], _given(expert, donor), dtype)
    return expert


AT_ONCE = 4  # images that are sampled in one batch


def draw_prompts(
    settings: ScreenSettings, specs: Sequence[ExpertSpec], frame: SharedParts, resolution: int, folder: Path
) -> Path:
    """Sample an image for each prompt, the experts taking turns; existing images are kept.

    resolution: side of the images in pixels
    folder:     is created and filled with images and captions
    Returns folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        ImageFile(folder / f"{place:05d}.png", Request(prompt, nth_seed(settings.seed, place)), {})
        for place, prompt in enumerate(read_prompts(Path(str(settings.prompts)))[: settings.images])
    ]
    sampling = Sampling(settings.steps, settings.guidance, height=resolution, width=resolution)
    missing = [
        [file for file in files[turn :: len(specs)] if file.found() is None] for turn in range(len(specs))
    ]
    done = len(files) - sum(map(len, missing))
    with tqdm(total=len(files), initial=done, desc="drawing", unit="image", file=sys.stderr) as bar:
        for spec, own in zip(specs, missing, strict=True):
            if own:
                ensemble = frame.load(spec)
                frame.vae.to(frame.device)
                sampler = PipelineSampler(settled(ensemble.pipeline(vae=frame.vae), ensemble.experts[0]))
                draw(own, sampler, sampling, AT_ONCE, bar)
                del ensemble, sampler
                free_memory()
    lines = [
        json.dumps({"file_name": file.path.name, "text": file.request.prompt}, ensure_ascii=False)
        for file in files
    ]
    write_atomically(folder / METADATA, "\n".join(lines) + "\n")
    return folder


PLACES = (
    16  # places of the image at which features are recorded, the same at every stage and for every expert
)
SEED = 5  # of the places


class RecordingStage:
    """A stage that records its output; all other attributes are those of the wrapped stage."""

    def __init__(self, stage: Stage, seen: dict[str, Tensor]) -> None:
        self._stage, self._seen = stage, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        features, after = self._stage.run(hidden, context, skip, size)
        self._seen[self._stage.name] = at_places(features).float().cpu()
        return features, after


@contextmanager
def record_features(denoiser: EnsembleDenoiser) -> Iterator[dict[str, Tensor]]:
    """Record the features of every pass inside the context.

    Yields a dict: stage -> (B, C, PLACES) float32 on the CPU, of the latest pass.
    """
    seen: dict[str, Tensor] = {}
    before = denoiser.parallel_stages
    recording = [tuple(RecordingStage(stage, seen) for stage in column) for column in before]
    denoiser.parallel_stages = recording  # type: ignore[assignment]
    try:
        yield seen
    finally:
        denoiser.parallel_stages = before


def at_places(features: Tensor) -> Tensor:
    """Select the features at PLACES relative positions of a map: (B, C, H, W) -> (B, C, PLACES)."""
    height, width = features.shape[-2:]
    spots = torch.rand(2, PLACES, generator=torch.Generator().manual_seed(SEED))
    rows, columns = (
        (spots[0] * height).long().to(features.device),
        (spots[1] * width).long().to(features.device),
    )
    return features[:, :, rows, columns]


@dataclass(frozen=True)
class Answers:
    """One expert's answers at one image.

    errors:   (BANDS, D, C, h, w) float32 on the CPU: prediction minus target, in the scheduler's kind
    features: stage -> (BANDS, C, PLACES) at the first noise; empty if they were not requested
    """

    errors: Tensor
    features: dict[str, Tensor]


class ExpertPredictor:
    """Computes the predictions of one expert, or of an ensemble, image by image.

    batch_size: noisy latents in one pass of the denoiser
    """

    def __init__(
        self, ensemble: Ensemble, conditions: Conditions, noising: Noising, probes: Probes, batch_size: int
    ) -> None:
        self.denoiser, self.conditions, self.noising = ensemble.denoiser, conditions, noising
        self.probes, self.batch_size = probes, batch_size

    @torch.no_grad()
    def predict(self, image: int, features: bool = False) -> Answers:
        """Predict at all timesteps and noises of one image; features: whether to record them too."""
        noise = self.probes.noise(image)
        bands, draws = noise.shape[:2]
        steps = self.probes.steps(image, self.noising).repeat_interleave(draws)  # (BANDS·D,)
        latents = self.probes.latents[image].expand(bands * draws, *noise.shape[2:])
        batch = Batch(latents, noise.flatten(0, 1), steps)
        caption, size = self.probes.captions[image], self.probes.sizes[image : image + 1]
        prompt = self.conditions([caption], size, torch.zeros(1, dtype=torch.bool))
        errors: list[Tensor] = []
        seen: list[dict[str, Tensor]] = []
        with record_features(self.denoiser) if features else nullcontext({}) as passing:
            for start in range(0, len(steps), self.batch_size):
                part = batch.part(start, min(start + self.batch_size, len(steps))).to(self.noising.device)
                errors.append((self._prediction(part, prompt) - self.noising.target(part)).cpu())
                seen.append(dict(passing))
        joined = {name: torch.cat([one[name] for one in seen])[::draws] for name in seen[0]}
        return Answers(torch.cat(errors).unflatten(0, (bands, draws)), joined)

    def _prediction(self, batch: Batch, prompt: dict[str, Any]) -> Tensor:
        count = len(batch.steps)
        work = Pass(
            self.denoiser,
            self.denoiser,
            self.noising,
            batch,
            captions=(),
            dropped=torch.zeros(count, dtype=torch.bool),
            encode=lambda dropped: repeated(prompt, count),
        )
        return work.prediction


def repeated(conditions: Any, count: int) -> Any:
    """Expand the conditions of a batch of one to a batch of `count`; tensors are expanded, not copied.

    A list of one tensor, of models that take a tensor for each image, becomes a list of `count`.
    """
    if isinstance(conditions, dict):
        return {name: repeated(value, count) for name, value in conditions.items()}
    if isinstance(conditions, Tensor) and conditions.ndim and len(conditions) == 1:
        return conditions.expand(count, *conditions.shape[1:])
    if isinstance(conditions, list) and len(conditions) == 1:
        return conditions * count
    return conditions


FEATURED = 8  # the number of images at which features are recorded


class AnswerStore:
    """The answers of one expert in a folder: errors of every image, features of the first FEATURED images.

    folder: is created
    shape:  of all errors (M, BANDS, D, C, h, w)
    Damaged answers count as missing, and are computed again.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        self._errors = RowStore(folder / "errors", shape[1:], torch.float32)

    def missing(self) -> list[int]:
        """Return the images without complete answers."""
        return [
            image
            for image in range(self.shape[0])
            if _key(image) not in self._errors
            or (image < FEATURED and read_arrays(self._features(image)) is None)
        ]

    def add(self, image: int, answers: Answers) -> None:
        """Keep the answers of an image; its features are written first."""
        if answers.features:
            with replacing(self._features(image)) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: tensor.numpy() for name, tensor in answers.features.items()})
        self._errors.add([_key(image)], answers.errors[None])

    def errors(self, image: int) -> Tensor:
        """Read the errors of one image: (BANDS, D, C, h, w)."""
        return self._errors.read([_key(image)])[0]

    def features(self) -> dict[str, NDArray[np.float32]]:
        """Read the features of all images: stage -> (samples, C, PLACES)."""
        parts = [dict(np.load(file)) for file in sorted(self.folder.glob("*-features.npz"))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _features(self, image: int) -> Path:
        return self.folder / f"{image:05d}-features.npz"


def _key(image: int) -> str:
    """The key of an image's row: 64 hexadecimal digits."""
    return f"{image:064x}"
