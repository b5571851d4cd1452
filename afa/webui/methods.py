"""Every way of making images from the loaded experts, as the page offers it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.names import known_methods
from afa.sampling.registry import SAMPLING_METHODS, make_options, make_sampler
from afa.sampling.sample import PipelineSampler, in_frame


@dataclass(frozen=True)
class Method:
    """One way of making images. title: for people; about: what it is.

    make: a sampler of the experts as they are now. record: what a picture says of it, in the words of `afa generate`.
    has_maps: it weighs the experts. scalable: strengths of experts scale those weights. own_loop: it takes no scheduler.
    """

    name: str
    title: str
    about: str
    make: Callable[[], Any]
    record: Mapping[str, Any]
    has_maps: bool = False
    scalable: bool = False
    own_loop: bool = False

    def made(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a picture that says this was made by this method."""
        return all(metadata.get(name) == value for name, value in self.record.items())


def find_methods(ensemble: Ensemble, trained: bool) -> tuple[dict[str, Method], dict[str, str]]:
    """All methods by name, and why others do not go with these experts. trained: whether the aggregators are."""
    offered = [*([_afa(ensemble)] if trained else []), *(_alone(ensemble, name) for name in ensemble.names)]
    refused: dict[str, str] = {}
    for name in (name for name, method in SAMPLING_METHODS.items() if not method.each):
        method = _combined(ensemble, name)
        try:
            method.make()  # costs no memory: the experts are there
            offered.append(method)
        except UserError as error:
            refused[method.title] = str(error)
    offered += [_own(ensemble, name) for name in ensemble.names]
    return {method.name: method for method in offered}, refused


def _afa(ensemble: Ensemble) -> Method:
    several = len(ensemble.names) > 1
    record = {"method": None, "method_options": None, "expert": None}

    def make() -> PipelineSampler:
        return PipelineSampler(in_frame(ensemble, ensemble.denoiser))

    return Method("afa", "AFA", known_methods()["afa"], make, record, has_maps=several, scalable=several)


def _alone(ensemble: Ensemble, name: str) -> Method:
    record = {"method": None, "method_options": None, "expert": name}
    make = partial(make_sampler, "single_in_ensemble", ensemble, expert=name)
    about = "one expert in the ensemble's frame (its VAE, tokenizer and scheduler)"
    return Method(f"expert:{name}", f"{name} alone", about, make, record)


def _own(ensemble: Ensemble, name: str) -> Method:
    record = {"method": "single", "method_options": {"expert": name}, "expert": name}
    make = partial(make_sampler, "single", ensemble, expert=name)
    return Method(
        f"single:{name}", f"{name} as it came", "one expert as the pipeline it came as", make, record
    )


def _combined(ensemble: Ensemble, name: str) -> Method:
    kind, make = SAMPLING_METHODS[name], partial(make_sampler, name, ensemble)
    record = {"method": name, "method_options": asdict(make_options(name, {})), "expert": None}
    title = kind.title[0].upper() + kind.title[1:]
    has_maps = kind.has_maps and len(ensemble.names) > 1
    scalable = has_maps and not kind.only_predictions
    return Method(name, title, kind.row, make, record, has_maps, scalable, kind.own_loop)
