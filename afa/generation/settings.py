"""What a generation run is asked to do. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.errors import UserError
from afa.options import option


@dataclass(frozen=True)
class GenerateSettings:
    """One generation run, field by field a flag of `afa generate`."""

    source: str = option(help="a saved ensemble, or a single expert (folder, .safetensors, org/name@revision)", positional=True)
    output: str = option(help="a folder for the images; images that are there already, made the same way, are kept")
    prompt: list[str] | None = option(None, help="one or more prompts")
    prompts: str | None = option(None, help="a file of prompts: one a line, or JSON lines with \"text\"")
    negative_prompt: str | None = option(None, help="what the images should not show")
    images_per_prompt: int = option(1, help="images of each prompt")
    seed: int = option(0, help="seed of the first image; image k has seed + k")
    steps: int = option(50, help="denoising steps")
    guidance: float = option(7.5, help="strength of classifier-free guidance; 1 turns it off")
    scheduler: str | None = option(None, help="ddim, ddpm, pndm, euler, euler_a, heun, lms, dpm++, dpm++_karras, unipc … (default: the experts')")
    width: int | None = option(None, help="in pixels (default: the experts' own)")
    height: int | None = option(None, help="in pixels (default: the experts' own)")
    batch_size: int = option(4, help="images made at once")
    expert: str | None = option(None, help="use only this expert, in the ensemble's frame")
    experts: list[str] | None = option(None, help="new places of an ensemble's experts that have moved, each NAME=PLACE")
    weights: bool = option(False, help="save the weight maps of every image: .npz, and a picture of them over the image")
    dtype: str = option("float32", help="of the models", choices=["float32", "bfloat16", "float16"])
    device: str | None = option(None, help="cpu, cuda, mps … (default: the best there is)")
    json: bool = option(False, help="print what was made as JSON")

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
        for name in ("images_per_prompt", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise UserError(f"--{name} {side} must be a multiple of 8 pixels")
        if self.guidance < 0 or self.seed < 0:
            raise UserError(f"--guidance {self.guidance:g} and --seed {self.seed} must not be negative")
