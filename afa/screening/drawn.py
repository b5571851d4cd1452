"""Without images: every expert draws its share of the prompts, and all are asked about all pictures."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from afa.experts.spec import ExpertSpec
from afa.files import replacing, write_atomically
from afa.generation.pictures import read_made
from afa.generation.prompts import read_prompts
from afa.generation.sample import Request, Sampling, sample
from afa.screening.alone import Common, forget
from afa.screening.settings import ScreenSettings
from afa.seeds import nth_seed
from afa.training.sources.files import METADATA

AT_ONCE = 4


def draw_prompts(settings: ScreenSettings, specs: Sequence[ExpertSpec], frame: Common, resolution: int, folder: Path) -> Path:
    """Prompt k is drawn by expert k, counted round; pictures that are there are kept: -> a folder of captioned images."""
    prompts = read_prompts(Path(str(settings.prompts)))[: settings.images]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{place:05d}.png" for place in range(len(prompts))]
    there = [read_made(file) is not None for file in files]
    with tqdm(total=len(prompts), desc="drawing", unit="image", file=sys.stderr, initial=sum(there)) as bar:
        for turn, spec in enumerate(specs):
            missing = [place for place in range(turn, len(prompts), len(specs)) if not there[place]]
            if missing:
                _draw(spec, missing, prompts, files, settings, frame, resolution, bar)
    lines = [json.dumps({"file_name": file.name, "text": prompt}, ensure_ascii=False) for file, prompt in zip(files, prompts, strict=True)]
    write_atomically(folder / METADATA, "\n".join(lines) + "\n")
    return folder


def _draw(
    spec: ExpertSpec, places: Sequence[int], prompts: Sequence[str], files: Sequence[Path], settings: ScreenSettings, frame: Common, side: int, bar: tqdm
) -> None:
    """One expert's share, some at once."""
    ensemble = frame.load(spec)
    frame.vae.to(frame.device)
    pipeline = ensemble.pipeline(vae=frame.vae)
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(settings.steps, settings.guidance, height=side, width=side)
    for start in range(0, len(places), AT_ONCE):
        part = places[start : start + AT_ONCE]
        images = sample(pipeline, [Request(prompts[place], nth_seed(settings.seed, place)) for place in part], sampling)
        for place, image in zip(part, images, strict=True):
            with replacing(files[place]) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
        bar.update(len(part))
    del ensemble, pipeline
    forget()
