"""The options of the demonstration. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.settings import GUIDANCE, SAMPLING_STEPS, SEED, CheckedOptions, option


@dataclass(frozen=True)
class DemoSettings(CheckedOptions):
    """The options of `afa demo`; each field is a flag."""

    output: str = option(
        "demo",
        help="a folder for report.html and the data, models and images behind it; finished parts are kept",
    )
    prompts: int = option(
        80, least=2, most=10**6, help="mixed scenes that every method draws, each from the same noise"
    )
    train_images: int = option(512, least=5, most=10**6, help="mixed scenes the aggregators are trained on")
    train_steps: int = option(250, least=1, most=10**9, help="training steps of AFA and of the router")
    steps: int = option(20, **SAMPLING_STEPS, help="denoising steps")
    guidance: float = option(3.0, **GUIDANCE, help="strength of classifier-free guidance")
    seed: int = option(0, **SEED, help="seed of training and noise, 0 to 2**64 - 1")
    json: bool = option(False, help="print the table as JSON")
