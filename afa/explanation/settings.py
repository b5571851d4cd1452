"""The settings of `afa explain`. This module imports no torch, so that --help is fast."""

from dataclasses import dataclass
from typing import Any, ClassVar

from afa.errors import UserError, unknown
from afa.settings import (
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    GUIDANCE,
    MOVED_HELP,
    SAMPLING_STEPS,
    SEED_OR_DRAWN,
    SIDE,
    CheckedOptions,
    option,
)

COUNTERFACTUALS = {
    "off": "each expert off in turn",
    "swapped": "every expert in the next one's place",
    "pairs": "every two experts in each other's place",
    "frozen": "weights at their mean over places, then over steps too",
    "equal": "all experts alike",
    "skipped": "experts left out where no image uses them",
}
DEFAULT = ["off", "swapped", "frozen", "equal", "skipped"]
NONE = "none"


@dataclass(frozen=True)
class ExplainSettings(CheckedOptions):
    """The settings of one explanation; each field is a flag of `afa explain`."""

    # The ensemble and the prompts are compared by their content.
    free: ClassVar[tuple[str, ...]] = ("ensemble", "output", "device", "json", "prompts")

    output: str = option(
        help="a folder for pictures, data and explain.html; images that are already explained there are kept"
    )
    ensemble: str | None = option(
        None,
        place=True,
        ensemble=True,
        help="a saved ensemble (default: the embedded one, with 20 steps and guidance 3)",
        positional=True,
    )
    prompt: list[str] | None = option(None, help="one or more prompts")
    prompts: str | None = option(None, help='a file of prompts: one a line, or JSON lines with "text"')
    negative_prompt: str | None = option(None, help="what the images should not show")
    seed: int = option(
        0,
        **SEED_OR_DRAWN,
        help="seed of the first image, 0 to 2**64 - 1; image k has seed + k; -1 draws one and prints it",
    )
    steps: int | None = option(None, **SAMPLING_STEPS, help="denoising steps (default: 50)")
    guidance: float | None = option(
        None,
        **GUIDANCE,
        help="strength of guidance; 1: off (default: the family's own: 7.5, SDXL 5, SD3 7, FLUX.1-dev 3.5)",
    )
    true_guidance: float | None = option(
        None,
        **GUIDANCE,
        help="FLUX: strength of classifier-free guidance beside the built-in one, at twice the cost",
    )
    scheduler: str | None = option(
        None, help="ddim, euler, dpm++ … as in afa generate (default: the experts')"
    )
    width: int | None = option(None, **SIDE, help="width of the images in pixels (default: the experts' own)")
    height: int | None = option(
        None, **SIDE, help="height of the images in pixels (default: the experts' own)"
    )
    counterfactuals: list[str] = option(
        DEFAULT,
        help="images to sample again with changed weights: "
        f"{'; '.join(f'{name} ({what})' for name, what in COUNTERFACTUALS.items())}; or {NONE}",
    )
    word_steps: int = option(
        4, least=0, most=10_000, help="number of steps at which the effect of each word is measured; 0: none"
    )
    threshold: float = option(
        0.02, above=0, below=1, help="an expert is unused where its mean weight stays below this"
    )
    experts: list[str] | None = option(None, place=True, help=MOVED_HELP)
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    json: bool = option(False, help="print explain.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
        self._check_counterfactuals()

    @property
    def kinds(self) -> list[str]:
        """The names of the counterfactuals, without repetitions."""
        given = [name for words in self.counterfactuals for name in words.split(",") if name]
        return [] if given == [NONE] else list(dict.fromkeys(given))

    def binding(self) -> dict[str, Any]:
        """Return the settings that must stay the same when a run is resumed."""
        return super().binding() | {"counterfactuals": self.kinds}

    def _check_counterfactuals(self) -> None:
        for name in self.kinds:
            if name == NONE:
                raise UserError(
                    f"--counterfactuals {' '.join(self.counterfactuals)} asks for none and for some;"
                    " give one or the other"
                )
            if name not in COUNTERFACTUALS:
                raise UserError(
                    f"--counterfactuals: {unknown(name, [*COUNTERFACTUALS, NONE], 'counterfactual')}"
                )
