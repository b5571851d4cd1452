"""A merge as it is asked for: steps, from flags, from a TOML file, or from a merged file's header.

A TOML file is its user's: experts are written as on the command line, or are names of earlier steps.

    [[step]]
    name = "soft"
    experts = ["photo.safetensors+style.safetensors*0.8", "paint"]
    options = {weights = [2, 1]}

    [[step]]
    method = "add_difference"
    experts = ["soft", "anime.safetensors"]
    base = "base.safetensors"
    dtype = "float16"

What a merged file's header says stands in record.py.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from afa.errors import UserError, unknown
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import HUB_ID, ExpertSpec, Lora, exists, new_places
from afa.merging.record import Dtype, Input, RecordedStep, read_record
from afa.merging.settings import MergeSettings
from afa.places import ASSETS, EMBEDDED, check_name, located
from afa.schema import Within, build, shown
from afa.text_files import read_toml
from afa.version import __version__

Value = (
    int | float | bool | str | list[float] | list[str] | dict[str, float | Annotated[list[float], Within(1)]]
)


@dataclass(frozen=True)
class MergeStep:
    """One merge of a recipe.

    experts, base: as asked for; a source may be the name of an earlier step
    options:       of the method; recorded ones are complete, and taken as they are
    vae:           an expert's name or a place; None: the first expert's
    dtype:         of the result; None: of the last step the first expert's, of others as it is computed
    recorded:      what the header of a merged file says of the inputs, by role (expert, base, vae) and name
    """

    method: str
    experts: tuple[ExpertSpec, ...]
    base: ExpertSpec | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    vae: str | ExpertSpec | None = None
    merge_vae: bool = False
    dtype: str | None = None
    recorded: Mapping[tuple[str, str], Input] | None = None

    @property
    def specs(self) -> list[ExpertSpec]:
        """The experts, and the base if there is one."""
        return [*self.experts, *([self.base] if self.base is not None else [])]


@dataclass(frozen=True)
class MergeRecipe:
    """Steps in order; the last one makes the result.

    config, prediction_type: of single files
    where:                   it was read
    """

    steps: tuple[MergeStep, ...]
    config: str | None = None
    prediction_type: str | None = None
    where: str = ""


def recipe_of(settings: MergeSettings) -> MergeRecipe:
    """The recipe that is asked for. Raises UserError for one that cannot be read or makes no sense."""
    if settings.recipe is None:
        asked = AskedStep(
            settings.experts or [], "", settings.method, settings.base, settings.options(), settings.vae,
            settings.merge_vae, settings.dtype,
        )  # fmt: skip
        return MergeRecipe((asked.parsed(settings),), settings.config, settings.prediction_type)
    file = Path(settings.recipe)
    recipe = _from_toml(file, settings) if file.suffix == ".toml" else _from_header(file, settings)
    _check_steps(recipe)
    return recipe


def _check_steps(recipe: MergeRecipe) -> None:
    """Names of steps are plain and their own; a step uses earlier ones only, and is used by a later one."""
    names = [step.name for step in recipe.steps]
    used = {spec.source for step in recipe.steps for spec in step.specs}
    for number, step in enumerate(recipe.steps, 1):
        where = f"{recipe.where}: step {number}"
        if number < len(names) and not step.name:
            raise UserError(f'{where} has no name, so no later step can use it; write name = "…"')
        if step.name and names.index(step.name) != number - 1:
            raise UserError(
                f"{where} is called '{step.name}' as step {names.index(step.name) + 1} is; choose another"
                " name"
            )
        if number < len(names) and step.name not in used:
            raise UserError(
                f"{where} ('{step.name}') is used by no later step; leave it out, or name it as an expert or"
                " base"
            )
        for spec in step.specs:
            if spec.source in names[number - 1 :] and spec.source and not exists(spec.source):
                raise UserError(
                    f"{where} uses '{spec.source}', which is not made before it; put that step first"
                )


# ---- a user's own TOML file -------------------------------------------------------------------------------


@dataclass
class AskedStep:
    """One step as its user writes it: by flags, or as [[step]] of a file, where these are the keys."""

    experts: Annotated[list[str], Within(1)]
    name: str = ""
    method: str = "weighted"
    base: str | None = None
    options: dict[str, Value] = field(default_factory=dict)
    vae: str | None = None
    merge_vae: bool = False
    dtype: Dtype | None = None

    def parsed(self, settings: MergeSettings) -> MergeStep:
        parse = functools.partial(ExpertSpec.parse, prediction_type=settings.prediction_type)
        return MergeStep(
            self.method,
            tuple(parse(text) for text in self.experts),
            None if self.base is None else parse(self.base),
            self.options,
            self.name,
            None if self.vae is None else located(self.vae),
            self.merge_vae,
            self.dtype,
        )


def _from_toml(file: Path, settings: MergeSettings) -> MergeRecipe:
    if not file.is_file():
        raise UserError(f"--recipe {file} is not there")
    found = read_toml(file)
    for key in found:
        if key != "step":
            raise UserError(f"{file}: {unknown(key, ['step'], 'key')}; a recipe is a list of [[step]]")
    steps = build(Annotated[list[dict[str, Any]], Within(1)], found.get("step"), file, "step")
    known, made = [one.name for one in dataclasses.fields(AskedStep)], []
    for number, entry in enumerate(steps, 1):
        where = f"{file}: step {number}"
        for key in entry:
            if key not in known:
                raise UserError(f"{where}: {unknown(key, known, 'key')}")
        asked: AskedStep = build(AskedStep, entry, where)
        if asked.vae is not None and asked.merge_vae:
            raise UserError(
                f"{where}: vae {asked.vae} takes one VAE and merge_vae merges them; leave out one"
            )
        if asked.name:
            check_name(asked.name, where)
        made.append(asked.parsed(settings))
    return MergeRecipe(tuple(made), settings.config, settings.prediction_type, str(file))


# ---- the header of a merged file --------------------------------------------------------------------------


def _from_header(file: Path, settings: MergeSettings) -> MergeRecipe:
    record = read_record(file)
    if record.afa != __version__:
        print(
            f"afa: {file} was merged by afa {shown(record.afa)}; this is {__version__}, the bytes may differ",
            file=sys.stderr,
        )
    places = new_places(settings.experts or [])
    inputs = {one.name for step in (*record.steps, record) for _, one in step.inputs() if one.step is None}
    for name in places:
        if name not in inputs:
            raise UserError(
                f"--experts {name}={places[name]}: {unknown(name, sorted(inputs), f'input of {file}')}"
            )
    finder = _Finder(file, places, settings.prediction_type or record.prediction_type)
    made = [step.name for step in record.steps]
    steps = tuple(finder.step(step, made[:number]) for number, step in enumerate((*record.steps, record)))
    config = settings.config or _config(file, record.config)
    return MergeRecipe(steps, config, settings.prediction_type or record.prediction_type, str(file))


def _config(file: Path, recorded: str | None) -> str | None:
    """The config that single files were read with: a shipped one, or a folder beside the merged file."""
    if recorded is None or recorded in KNOWN_CONFIGS:
        return recorded
    beside = file.parent / check_name(recorded, f"the config of {file}")
    if not beside.is_dir():
        raise UserError(
            f"{file} was merged with the config folder '{recorded}', which is not beside it; give it with"
            " --config"
        )
    return str(beside)


@dataclass(frozen=True)
class _Finder:
    """Where the inputs of a recorded recipe are. places: that the user gave, by name."""

    file: Path
    places: Mapping[str, str]
    prediction_type: str | None

    def step(self, step: RecordedStep, made: Sequence[str]) -> MergeStep:
        """made: the names of the steps before it."""
        weights = step.options.get("weights")
        if isinstance(weights, str):
            raise UserError(f"{self.file}: its recipe has the weights {shown(weights)}, expected numbers")
        experts = tuple(self._spec(one, made) for one in step.experts)
        base = None if step.base is None else self._spec(step.base, made)
        vae: str | ExpertSpec | None = None
        if isinstance(step.vae, Input):
            own = any(step.vae.name == one.name for one in step.experts)
            vae = step.vae.name if own else self._spec(step.vae)
        recorded = {(role, one.name): one for role, one in step.inputs()}
        merged = step.vae == "merged"
        return MergeStep(
            step.method, experts, base, step.options, step.name, vae, merged, step.dtype, recorded
        )

    def _spec(self, one: Input, made: Sequence[str] = ()) -> ExpertSpec:
        """An input as an expert. Raises UserError if it is nowhere, or its place is no plain name."""
        name = check_name(one.name, f"an input of {self.file}")
        if one.step is not None:
            if one.step not in made:
                raise UserError(
                    f"{self.file}: its recipe uses the step {shown(one.step)}, which is not made before it"
                )
            return ExpertSpec(name, one.step, loras=self._loras(one))
        if name in self.places:
            spec = ExpertSpec.parse(f"{name}={self.places[name]}", self.prediction_type)
            mine, theirs = ([lora.strength for lora in loras] for loras in (spec.loras, one.loras))
            if mine and mine != theirs:
                made = f"{self.file} was made with {theirs}"
                raise UserError(f"--experts {spec}: its LoRAs have the strengths {mine}, {made}")
            return dataclasses.replace(spec, loras=spec.loras or self._loras(one))
        if one.commit is not None and one.source is not None:
            if exists(one.source) or not HUB_ID.fullmatch(one.source):
                advice = f"give it with --experts {name}=PLACE"
                raise UserError(
                    f"{self.file}: input '{name}' is said to be {shown(one.source)} of the hub; {advice}"
                )
            return ExpertSpec(
                name, one.source, one.commit, self._loras(one), str(self.file), self.prediction_type
            )
        model = (one.source or "").removeprefix("demo:")
        if model != one.source and model in EMBEDDED:
            place = str(ASSETS / model)
        else:
            place = str(self._beside(one.source, f"input '{name}'", one.sha256, f"--experts {name}=PLACE"))
        return ExpertSpec(name, place, None, self._loras(one), None, self.prediction_type)

    def _beside(self, source: str | None, what: str, hashes: Mapping[str, str], advice: str) -> Path:
        """A file or folder of that plain name beside the merged file."""
        digest = next(iter(hashes.values()), "")
        named = f"{what}{f' ({source})' if source else ''} with sha256 {digest}"
        if source is None:
            raise UserError(
                f"{self.file} was made of {named}, and does not say where it is from; give it with {advice}"
            )
        found = self.file.absolute().parent / check_name(source, f"{what} of {self.file}")
        if not found.exists():
            raise UserError(f"{self.file} was made of {named}, which is not beside it; give it with {advice}")
        return found

    def _loras(self, one: Input) -> tuple[Lora, ...]:
        """Of an input, beside the merged file."""
        advice = f"--experts {one.name}=PLACE+LORA*STRENGTH"
        places = [
            self._beside(lora.source, f"the LoRA of '{one.name}'", {"": lora.sha256}, advice)
            for lora in one.loras
        ]
        return tuple(Lora(str(place), lora.strength) for place, lora in zip(places, one.loras, strict=True))
