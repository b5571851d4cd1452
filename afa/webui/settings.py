"""The settings of `afa ui`. This module imports no torch, so that --help is fast."""

from dataclasses import dataclass

from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import (
    CONFIG_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    FRAME_HELP,
    MOVED_HELP,
    SAMPLING_STEPS,
    SIDE,
    TEXT_ENCODER_HELP,
    VAE_HELP,
    CheckedOptions,
    option,
)

FIRST_PORT = 7860


@dataclass(frozen=True)
class UiSettings(CheckedOptions):
    """The settings of one page; each field is a flag of `afa ui`."""

    sources: list[str] = option(
        [],
        place=True,
        ensemble=True,
        help="a saved ensemble, or experts to combine while sampling (default: the embedded ensemble)",
        positional=True,
    )
    host: str = option(
        "127.0.0.1",
        help="address to listen on; with 0.0.0.0, every machine that can reach this one can open the page",
    )
    names: list[str] | None = option(
        None,
        help="more host names under which the page may be opened, such as a proxy's;"
        " needed only with a --host that other machines can reach",
    )
    port: int | None = option(
        None,
        least=1,
        most=65535,
        help=f"port to listen on (default: {FIRST_PORT}, or the next free one)",
    )
    output: str = option("afa-ui", help="a folder for the pictures, which is the page's gallery")
    reports: list[str] | None = option(
        None, help="reports to show: .html files, or folders of afa evaluate, afa screen or afa demo"
    )
    lora_dir: str | None = option(
        None,
        help="a folder of LoRAs, which prompts in A1111's syntax name: <lora:style:0.8> is style.safetensors "
        "at strength 0.8, in all experts",
    )
    queue: int = option(
        8, least=1, most=1000, help="runs that may wait; further runs are refused until one has finished"
    )
    max_images: int = option(4, least=1, most=1000, help="images of each method that a run may ask for")
    max_steps: int = option(100, **SAMPLING_STEPS, help="denoising steps that a run may ask for")
    max_side: int | None = option(
        None,
        **SIDE,
        help="height and width that a run may ask for, in pixels (default: twice the experts' own)",
    )
    experts: list[str] | None = option(None, place=True, help=MOVED_HELP)
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    frame: str | None = option(
        None,
        place=True,
        help=FRAME_HELP,
    )
    text_encoder: list[str] | None = option(None, place=True, help=TEXT_ENCODER_HELP)
    vae: str | None = option(None, place=True, help=f"{VAE_HELP} (default: the first expert's)")
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
