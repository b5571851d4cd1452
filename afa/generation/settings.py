"""The options of a generation run. No heavy imports: the command line's help comes from here."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from afa.defaults import GENERATION_STEPS, OUTER_STAGES, PACK_SIZE
from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.generation.grid import check_grid
from afa.prompt_syntax import PLAIN, SYNTAXES
from afa.sampling.options import MethodOptions
from afa.sampling.regions import Region, parse_region, read_mask
from afa.sampling.registry import SAMPLING_METHODS, check_base, read_options
from afa.settings import (
    CONFIG_HELP,
    COUNT,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    FRAME_HELP,
    GUIDANCE,
    LEVELS,
    MOVED_HELP,
    SAMPLING_STEPS,
    SEED_OR_DRAWN,
    SIDE,
    STORE_HELP,
    STORES,
    TEXT_ENCODER_HELP,
    VAE_HELP,
    WEIGHT,
    CheckedOptions,
    Interval,
    check_interval,
    check_number,
    option,
)


@dataclass(frozen=True)
class GenerateSettings(CheckedOptions):
    """The options of `afa generate`; each field is a flag."""

    sources: list[str] = option(
        place=True,
        ensemble=True,
        help="a saved ensemble or an expert (folder, .safetensors, org/name@revision); "
        "with --method also several experts",
        positional=True,
    )
    output: str = option(
        help="a folder for the images; an image that is already there and was made the same way is kept"
    )
    prompt: list[str] | None = option(None, help="one or more prompts")
    prompts: str | None = option(None, help='a file of prompts: one a line, or JSON lines with "text"')
    negative_prompt: str | None = option(None, help="what the images should not show")
    prompt_syntax: str = option(
        PLAIN,
        help="plain: prompts are read as they are; a1111: (word:1.2), ((word)), [word], \\( and BREAK as in "
        "A1111's web UI, and long prompts in chunks (SD 1.x, 2.x, SDXL)",
        choices=list(SYNTAXES),
    )
    lora_dir: str | None = option(
        None,
        help="with --prompt-syntax a1111: a folder of LoRAs, which prompts name: <lora:style:0.8> is "
        "style.safetensors at strength 0.8, in all experts",
    )
    grid: list[str] | None = option(
        None,
        help="draw a labelled grid: two or three axes (columns, rows, groups of rows), each prompt, seed, or "
        "with values method=afa,noise_average, expert=NAME,NAME, guidance=2,4, steps=10,20, "
        "strength:NAME=0,1; all images have the same noise unless seed is an axis",
    )
    images_per_prompt: int = option(1, **COUNT, help="images of each prompt")
    seed: int = option(
        0,
        **SEED_OR_DRAWN,
        help="seed of the first image, 0 to 2**64 - 1; image k has seed + k; -1 draws one and prints it",
    )
    steps: int | None = option(
        None, **SAMPLING_STEPS, help=f"denoising steps (default: {GENERATION_STEPS}, or those of --speed)"
    )
    speed: str | None = option(
        None,
        help="how to draw: exact, or more cheaply in a way that `afa calibrate` found for this ensemble",
        choices=LEVELS,
    )
    guidance: float | None = option(
        None,
        **GUIDANCE,
        help="strength of guidance, 1 turns it off (default: the family's own: 7.5, SDXL 5, SD3 7, "
        "FLUX.1-dev 3.5)",
    )
    true_guidance: float | None = option(
        None,
        **GUIDANCE,
        help="FLUX: strength of classifier-free guidance beside the built-in one, at twice the cost",
    )
    guidance_interval: str | None = option(
        None,
        help="START,END: guidance only between these shares of the steps, such as 0,0.6; every other step "
        "costs half (SD, SDXL, SD3)",
    )
    scheduler: str | None = option(
        None,
        help="ddim, ddpm, pndm, euler, euler_a, heun, lms, dpm++, dpm++_karras, unipc …; for flow models:"
        " euler, dpm++, unipc (default: the experts' own)",
    )
    width: int | None = option(None, **SIDE, help="width of the images in pixels (default: the experts' own)")
    height: int | None = option(
        None, **SIDE, help="height of the images in pixels (default: the experts' own)"
    )
    batch_size: int = option(4, **COUNT, help="images made at once")
    shard: str | None = option(
        None,
        help="I/N: draw the I-th of N parts of the images, beside commands that draw the others into one "
        "folder (I from 1, such as a number of a SLURM array)",
    )
    pack: str | None = option(
        None,
        help="when all images are drawn, put them into shards: tar (webdataset's layout) or parquet, which "
        "`afa train --data` reads",
        choices=["tar", "parquet"],
    )
    pack_size: int | None = option(
        None, **COUNT, help=f"images in a shard of --pack (default: {PACK_SIZE:,})"
    )
    parallel: str | None = option(
        None,
        help="experts: the processes of torchrun share the experts of an ensemble, one device each, and not "
        "the images",
        choices=["experts"],
    )
    method: str | None = option(
        None,
        help="how to combine the experts, see above (default: the saved ensemble, or the expert)",
    )
    method_option: list[str] | None = option(
        None, help="options of the method, each KEY=VALUE; a list has commas between its values"
    )
    base: str | None = option(
        None, place=True, help="the model the experts were tuned from; --method loratorio needs it"
    )
    strength: list[str] | None = option(
        None, help="scale an expert's weights, each NAME=FACTOR: 0 turns it off, 1 changes nothing"
    )
    region: list[str] | None = option(
        None,
        help="a strength in a part of the picture and of the steps, each "
        "NAME=FACTOR[,start=SHARE][,end=SHARE][,mask=PNG]; it holds where the mask is white",
    )
    shared_guidance_weights: bool = option(
        False,
        help="blend both predictions of guidance by the weights of the one with the prompt",
    )
    expert: str | None = option(
        None, help="use only this expert, in the ensemble's frame; with --method single: as its own pipeline"
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
    weights: bool = option(
        False, help="save the weight maps of every image: .npz, and a picture of them over the image"
    )
    reuse: int = option(
        1,
        least=1,
        most=100,
        help="run all of the ensemble in every K-th step only; in between one expert leads (--lead), or the "
        "inner stages of U-Nets are left out",
    )
    reuse_outer: int | None = option(
        None,
        least=1,
        most=100,
        help="with --reuse, without --lead: stages at either end that run in all steps "
        f"(default: {OUTER_STAGES})",
    )
    lead: str | None = option(
        None,
        help="with --reuse: the expert that runs in every step; between whole steps, what the others added "
        "in the last one is added again",
    )
    store: str | None = option(None, help=STORE_HELP, choices=STORES)
    compile: bool = option(
        False,
        help="compile the ensemble by torch.compile before the first image: minutes once, then faster steps",
    )
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    json: bool = option(False, help="print the paths of the images as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pack()
        if self.grid is not None:
            check_grid(self)  # each of its points has the checks below
            return
        self.strengths()
        self._check_regions()
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
        if self.lora_dir is not None and self.prompt_syntax == PLAIN:
            raise UserError(
                f"--lora-dir {self.lora_dir} is for LoRAs that prompts name, <lora:style:0.8>, which are "
                "read with --prompt-syntax a1111; add that, or leave it out"
            )
        self._check_method()
        if self.strengths() and self.expert is not None:
            raise UserError(
                f"--strength scales what experts weigh, and --expert {self.expert} is alone; "
                "leave out one of them"
            )
        self._check_shared_guidance()
        self._check_interval()
        self._check_speed()
        self.part()
        for name in ("method", "expert", "lead", "store", "compile", "lora_dir"):
            if self.parallel is not None and getattr(self, name):
                raise UserError(
                    f"--parallel {self.parallel} is for whole ensembles as they are, "
                    f"and --{name.replace('_', '-')} is given; leave out one of them"
                )
        self._check_reuse()
        if self.compile and self.method is not None:
            raise UserError(
                f"--compile is for an ensemble's own denoiser, and --method {self.method} calls its experts; "
                "leave out one of them"
            )

    def _check_pack(self) -> None:
        """Raise UserError for a size without shards, and for files that shards do not hold."""
        if self.pack is None:
            if self.pack_size is not None:
                raise UserError(f"--pack-size {self.pack_size} needs --pack tar or parquet; add it")
            return
        for name in ("weights", "grid"):
            if getattr(self, name):
                raise UserError(
                    f"--pack {self.pack} is for images alone, and --{name} is given; leave out one"
                )

    def regions(self) -> list[tuple[Region, str | None]]:
        """Return the regions, each with the path of its mask. Raises UserError."""
        return [parse_region(text) for text in self.region or ()]

    def read_regions(self) -> list[Region]:
        """Return the regions with their masks. Raises UserError."""
        return [
            region if path is None else replace(region, mask=read_mask(path))
            for region, path in self.regions()
        ]

    def _check_regions(self) -> None:
        """Raise UserError for options that do not go with strengths in parts of the picture."""
        if not self.regions():
            return
        if self.expert is not None:
            raise UserError(
                f"--region scales what experts weigh, and --expert {self.expert} is alone; "
                "leave out one of them"
            )
        if self.reuse > 1 or self.speed not in (None, "exact"):
            fast = f"--reuse {self.reuse}" if self.speed is None else f"--speed {self.speed}"
            raise UserError(
                f"--region holds in the steps it names, and {fast} uses features of other steps; "
                "leave out one of them"
            )

    def _check_reuse(self) -> None:
        """Raise UserError for options that do not go with reused features."""
        if self.lead is not None and self.reuse_outer is not None:
            raise UserError(
                f"--reuse-outer {self.reuse_outer} is for inner stages that are left out, "
                f"and --lead {self.lead} leaves out experts; give one of them"
            )
        for name, value in (("reuse-outer", self.reuse_outer), ("lead", self.lead)):
            if self.reuse == 1 and value is not None:
                raise UserError(f"--{name} {value} is for --reuse K with K above 1; leave it out")
        for name, value in (("method", self.method), ("expert", self.expert)):
            if self.reuse > 1 and value is not None:
                raise UserError(
                    f"--reuse {self.reuse} is for a whole ensemble, and --{name} {value} runs its experts; "
                    "leave out one of them"
                )
        if self.reuse > 1 and self.weights:
            raise UserError(
                "--weights needs the weights of all stages in all steps, "
                f"and --reuse {self.reuse} leaves some out; leave out one of them"
            )

    def _check_shared_guidance(self) -> None:
        """Raise UserError if no aggregator weighs, or guidance makes no two predictions to share weights."""
        if not self.shared_guidance_weights:
            return
        for name, value in (("method", self.method), ("expert", self.expert)):
            if value is not None:
                raise UserError(
                    "--shared-guidance-weights is about what aggregators weigh, "
                    f"and --{name} {value} uses none; leave out one of them"
                )
        if self.guidance is not None and self.guidance <= 1:
            raise UserError(
                "--shared-guidance-weights is for both predictions of guidance, "
                f"and --guidance {self.guidance:g} makes only one; give one above 1"
            )

    def interval(self) -> Interval | None:
        """Return where guidance begins and ends, as shares of the steps; None: in all. Raises UserError."""
        if self.guidance_interval is None:
            return None
        try:
            start, end = map(float, self.guidance_interval.split(","))
        except ValueError:
            raise UserError(
                f"--guidance-interval {self.guidance_interval} is no START,END, such as 0,0.6"
            ) from None
        check_interval((start, end), "--guidance-interval")
        return start, end

    def _check_speed(self) -> None:
        """Raise UserError for options that --speed decides, or that draw without the whole ensemble."""
        if self.speed is None:
            return
        names = ("steps", "reuse", "reuse_outer", "lead", "guidance_interval", "method", "expert")
        for name in names:
            value = getattr(self, name)
            if value is not None and (name, value) != ("reuse", 1):
                raise UserError(
                    f"--speed {self.speed} says how the whole ensemble draws, "
                    f"and so does --{name.replace('_', '-')} {value}; leave out one of them"
                )

    def _check_interval(self) -> None:
        """Raise UserError if guidance cannot be left out of some steps."""
        if self.interval() is None:
            return
        asked = f"--guidance-interval {self.guidance_interval}"
        if self.guidance is not None and self.guidance <= 1:
            raise UserError(
                f"{asked} is for guidance, and --guidance {self.guidance:g} makes none; leave it out"
            )
        if self.weights:
            raise UserError(
                f"--weights needs both predictions of guidance in all steps, and {asked} leaves some out; "
                "leave out one of them"
            )
        method = None if self.method is None else SAMPLING_METHODS[self.method]
        if method is not None and (method.needs_guidance or method.own_loop):
            raise UserError(
                f"--method {self.method} needs both predictions of guidance in all steps; leave out {asked}"
            )

    def part(self) -> tuple[int, int]:
        """Return which part of the images is drawn, from 0, and of how many. Raises UserError for no I/N."""
        index, slash, count = (self.shard or "1/1").partition("/")
        whole = slash and index.isdecimal() and count.isdecimal() and len(count) < 10
        if not whole or not 1 <= int(index) <= int(count):
            raise UserError(f"--shard {self.shard} is no I/N with I from 1 to N, such as 1/4")
        if self.shard is not None and self.seed == -1:
            raise UserError(
                "--seed -1 draws another seed for every part; give one seed to all commands with --shard"
            )
        return int(index) - 1, int(count)

    def strengths(self) -> dict[str, float]:
        """Return the factors by expert name. Raises UserError for a value that is not a factor."""
        found = {}
        for text in self.strength or ():
            name, _, factor = text.rpartition("=")
            try:
                found[name] = float(factor)
            except ValueError:
                raise UserError(
                    f"--strength {text} is no NAME=FACTOR, such as {name or 'photo'}=0.5"
                ) from None
            check_number(found[name], f"--strength {name}: the factor is", **WEIGHT)
            if not name:
                raise UserError(f"--strength {text} names no expert; write NAME={text.lstrip('=')}")
        return found

    def method_options(self) -> MethodOptions | None:
        """Return the method's options, checked, with --expert; None without a method. Raises UserError."""
        if self.method is None:
            return None
        named = [] if self.expert is None else [f"expert={self.expert}"]
        return read_options(self.method, [*(self.method_option or []), *named])

    def method_record(self) -> dict[str, Any] | None:
        """Return all options of the method with their values, for the PNG."""
        options = self.method_options()
        return None if options is None else asdict(options)

    def _check_method(self) -> None:
        """Check that --method and the other options fit together."""
        options = self.method_options()
        if options is None:
            if self.method_option:
                raise UserError(
                    f"--method-option {' '.join(self.method_option)} needs a --method that it is an option of"
                )
            if len(self.sources) > 1:
                raise UserError(
                    f"{len(self.sources)} sources ({', '.join(self.sources)}) must be combined somehow; "
                    "choose with --method"
                )
            if self.base is not None:
                raise UserError(f"--base {self.base} needs a --method that uses it, such as loratorio")
            return
        assert self.method is not None
        check_base(self.method, self.base)
        method = SAMPLING_METHODS[self.method]
        if method.needs_guidance and self.guidance is not None and self.guidance <= 1:
            raise UserError(
                f"--method {self.method} compares what guidance adds, "
                f"and --guidance {self.guidance:g} adds nothing; give one above 1"
            )
        if method.own_loop and self.scheduler is not None:
            raise UserError(
                f"--method {self.method} makes its steps itself; leave out --scheduler {self.scheduler}"
            )
        if self.weights and not method.has_maps:
            raise UserError(f"--method {self.method} has no weight maps; leave out --weights")
