"""LoRAs that prompts name, <lora:style:0.8>, from one folder; each image has those of its prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.files import sha256
from afa.prompt_syntax import NamedLora, split_loras
from afa.schema import shown

Chosen = tuple[NamedLora, ...]


class PromptLoras:
    """The LoRAs of all prompts. All experts get each of them, beside their weights, once.

    folder:  of the .safetensors files, or None; a name in a prompt is a file's name without its ending
    prompts: all prompts of the run, in A1111's syntax
    Raises UserError for a LoRA that is not in the folder.
    """

    def __init__(self, folder: str | None, prompts: Sequence[str]) -> None:
        self.texts: dict[str, str] = {}  # prompt -> what is left of it for the text encoders
        self.chosen: dict[str, Chosen] = {}  # prompt -> its LoRAs
        for number, prompt in enumerate(prompts, 1):
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            self.texts[prompt], loras = split_loras(prompt, which)
            self.chosen[prompt] = _added_up(loras)
        names = dict.fromkeys(lora.name for own in self.chosen.values() for lora in own)
        self.paths = find_loras(folder, list(names))
        self.sums = {name: sha256(path) for name, path in self.paths.items()}
        self.adapters = {name: f"prompt_{number}" for number, name in enumerate(names)}

    def load(self, ensemble: Ensemble) -> None:
        """Load them, all switched off. Raises UserError for a file that does not fit."""
        for name, path in self.paths.items():
            ensemble.load_lora(path, adapter_name=self.adapters[name])
        self.activate(ensemble, ())

    def files(self, prompt: str) -> dict[str, str]:
        """Return the sha256 of the LoRAs of a prompt, as PNGs record them."""
        return {f"LoRA '{lora.name}'": self.sums[lora.name] for lora in self.chosen[prompt]}

    def activate(self, ensemble: Ensemble, chosen: Chosen) -> None:
        """Switch on these LoRAs, and no others."""
        for host in _hosts(ensemble) if self.adapters else ():
            if chosen:
                host.enable_lora()
                names = [self.adapters[lora.name] for lora in chosen]
                host.set_adapters(names, [lora.strength for lora in chosen])
            else:
                host.disable_lora()

    @contextmanager
    def loaded(self, ensemble: Ensemble, prompt: str) -> Iterator[None]:
        """Inside the context, have the LoRAs of one prompt loaded and switched on; afterwards, none of them.

        Raises UserError for a file that does not fit.
        """
        try:
            self.load(ensemble)
            self.activate(ensemble, self.chosen.get(prompt, ()))
            yield
        finally:
            for host in _hosts(ensemble) if self.adapters else ():
                host.delete_adapters(list(self.adapters.values()))


def _hosts(ensemble: Ensemble) -> list[Any]:
    return [ensemble.denoiser, *ensemble.text_encoders]


def _added_up(loras: Sequence[NamedLora]) -> Chosen:
    """Add the strengths of a LoRA that is named several times, as A1111 does."""
    strengths: dict[str, float] = {}
    for lora in loras:
        strengths[lora.name] = strengths.get(lora.name, 0.0) + lora.strength
    return tuple(NamedLora(name, strength) for name, strength in strengths.items())


def find_loras(folder: str | None, names: Sequence[str]) -> dict[str, Path]:
    """Find the files of LoRAs by their names.

    Names are compared with those of the folder's files, so that none leads out of it; nor do links.
    Raises UserError for a name that is not there.
    """
    if not names:
        return {}
    if folder is None:
        raise UserError(
            f"a prompt asks for the LoRA {shown(names[0])}; say where it is with --lora-dir FOLDER, "
            "or give it to an expert as EXPERT+FILE*STRENGTH"
        )
    found = loras_in(folder)
    for name in names:
        if name not in found:
            raise UserError(f"--lora-dir {folder}: {unknown(shown(name)[1:-1], sorted(found), 'LoRA')}")
    return {name: found[name] for name in names}


def loras_in(folder: str) -> dict[str, Path]:
    """List the LoRAs of a folder: name -> file, in order. Raises UserError if there is none."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"--lora-dir {folder} is no folder")
    found = {
        path.stem: path
        for path in sorted(place.glob("*.safetensors"))
        if path.is_file() and path.resolve().is_relative_to(place.resolve())
    }
    if not found:
        raise UserError(f"--lora-dir {folder} holds no LoRA, a file that ends in .safetensors")
    return found
