"""Generate many images in a run that can resume. Each PNG says how it was made."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from afa.defaults import PACK_SIZE
from afa.devices import process_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.files import locked, refuse_busy, replacing, write_atomically
from afa.generation.drawing import Drawing, deal, draw_missing
from afa.generation.grid import Grid
from afa.generation.packs import Packs
from afa.generation.prompt_loras import PromptLoras
from afa.generation.ready import made_of, make_drawing, ready_ensemble
from afa.generation.settings import GenerateSettings
from afa.generation.speed import at_level
from afa.images import read_pixels
from afa.pictures import grid as grid_picture
from afa.prompt_syntax import A1111
from afa.prompts import asked_prompts
from afa.seeds import nth_seed, with_seed

GRID_UP_TO = 400  # images; a larger grid is no longer looked at


def generate(settings: GenerateSettings) -> list[Path]:
    """Generate the images that are missing in settings.output. Ctrl-C loses at most one batch.

    Several processes (accelerate launch) share the images, and so do commands with --shard.
    settings: the options of `afa generate`
    Returns the paths of all images, or with --shard of its part, one PNG each; of shards, once they are
    packed. Raises UserError.
    """
    settings = at_level(settings)
    prompts = asked_prompts(settings.prompt, settings.prompts)
    device = process_device(settings.device)  # before minutes are spent on loading
    state = PartialState()
    drawn = [with_seed(settings).seed if state.is_main_process else settings.seed]
    settings = replace(settings, seed=broadcast_object_list(drawn)[0])
    output = Path(settings.output)
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    refuse_busy(output, shared=settings.shard is not None)
    packs = Packs(output, settings.pack, settings.pack_size or PACK_SIZE)
    grid = None if settings.grid is None else Grid(settings, prompts)
    variants = [settings] if grid is None else grid.variants
    loras = PromptLoras(settings.lora_dir, prompts if settings.prompt_syntax == A1111 else [])
    files, regions = made_of(settings), settings.read_regions()
    ensemble = ready_ensemble(settings, variants, loras, prompts, device)
    drawings = []
    for index, variant in enumerate(variants):
        asked = _asked(settings, prompts) if grid is None else grid.requests[index]
        drawings.append(make_drawing(variant, ensemble, asked, files, regions, loras, grid, packs))
    whole, (part, parts) = settings.parallel is not None, settings.part()
    own = deal(drawings, part, parts)
    with locked(output, shared=settings.shard is not None):
        state.wait_for_everyone()  # until the first process has removed what killed ones left
        first, step = (0, 1) if whole else (state.process_index, state.num_processes)
        shares = deal(own, first, step)
        total, quiet = sum(len(share.images) for share in shares), not state.is_main_process
        with (
            _compiled(settings, ensemble),
            tqdm(total=total, desc="images", unit="image", file=sys.stderr, disable=quiet) as bar,
        ):
            for share in shares:
                draw_missing(share, ensemble, loras, bar)
        group = ensemble.denoiser.group
        if group is not None and group.passes and state.is_main_process:
            megabytes = group.sent / group.passes / 1e6
            print(
                f"afa: {state.num_processes} processes; each got {megabytes:.3g} MB a step from the others",
                file=sys.stderr,
            )
        state.wait_for_everyone()
        images = [image for drawing in drawings for image in drawing.images]
        found: list[Any] = [None]  # by the first process: whether all are there; the shards of them
        if state.is_main_process and (parts == 1 or all(image.found() for image in images)):
            found[0] = _finish(output, drawings, grid, packs)
        packed = broadcast_object_list(found)[0]
    if packed:
        return packed
    return [image.path for drawing in own for image in drawing.images]


@contextlib.contextmanager
def _compiled(settings: GenerateSettings, ensemble: Ensemble) -> Iterator[None]:
    """With --compile, compile the denoiser at its first call. Raises UserError where no compiler works."""
    if not settings.compile:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    ensemble.denoiser.compile()
    try:
        yield
    except (BackendCompilerFailed, InductorError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"--compile does not work here: {why}; leave it out") from None


def _asked(settings: GenerateSettings, prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Return all prompts with seeds. Seeds count on over prompts, so all images have different noise."""
    copies = settings.images_per_prompt
    return [
        (prompt, nth_seed(settings.seed, index * copies + copy))
        for index, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


def _finish(output: Path, drawings: Sequence[Drawing], grid: Grid | None, packs: Packs) -> list[Path]:
    """Write images.jsonl (`afa train --data` reads it after a rename) and a grid, or pack all images.

    Without --grid the grid has a row per prompt.
    Returns the shards, if images are packed.
    """
    images = [image for drawing in drawings for image in drawing.images]
    if packs.kind is not None:
        return packs.write(images)
    lines = []
    for image in images:
        facts = {"file_name": image.path.name, "text": image.request.prompt, "seed": image.request.seed}
        lines.append(json.dumps(facts, ensure_ascii=False))
    write_atomically(output / "images.jsonl", "\n".join(lines) + "\n")
    if grid is not None:
        sheet = grid.picture([[image.path for image in drawing.images] for drawing in drawings])
    elif 1 < len(images) <= GRID_UP_TO:
        pixels = [read_pixels(image.path) for image in images]
        columns = drawings[0].settings.images_per_prompt
        width = columns if columns > 1 else min(8, len(pixels))
        sheet = grid_picture([pixels[start : start + width] for start in range(0, len(pixels), width)])
    else:
        return []
    with replacing(output / "grid.png") as temporary:
        sheet.save(temporary, format="PNG")
    return []
