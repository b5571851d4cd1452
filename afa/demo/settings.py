"""What the demonstration is asked to do. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.errors import UserError
from afa.options import option


@dataclass(frozen=True)
class DemoSettings:
    """One demonstration, field by field a flag of `afa demo`."""

    output: str = option("demo", help="a folder for report.html and everything it rests on; what is finished there is kept")
    prompts: int = option(80, help="mixed scenes that every method draws, each from the same noise")
    train_images: int = option(512, help="mixed scenes the aggregators are trained on")
    train_steps: int = option(250, help="training steps of AFA and of the router")
    steps: int = option(20, help="denoising steps")
    guidance: float = option(3.0, help="strength of classifier-free guidance")
    seed: int = option(0, help="of training and noise")
    json: bool = option(False, help="print the table as JSON")

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("train_images", 5), ("train_steps", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
