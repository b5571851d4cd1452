"""What denoisers alone get from a donor: loaded, or described without weights. See afa/experts/donor.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from afa.errors import UserError
from afa.experts.description import ExpertDescription
from afa.experts.donor import DonorDescription, DonorSpec, describe_donor, files_of, gather, shares_texts
from afa.experts.expert import Expert
from afa.experts.headers import check_finite
from afa.experts.locate import locate
from afa.experts.prediction import predicting, warn_once
from afa.experts.spec import ExpertSpec, exists
from afa.experts.text_names import text_encoders_beside
from afa.experts.vae import describe_vae
from afa.models.registry import FAMILIES
from afa.text_encoder import same_weights


def load_donor(spec: DonorSpec, like: Expert, dtype: torch.dtype | None) -> Expert:
    """Load a donor. Arguments and errors: see describe_donor; and for weights that are not finite."""
    return _loaded(describe_donor(spec, like), dtype, [])


def _loaded(described: DonorDescription, dtype: torch.dtype | None, known: Sequence[Any]) -> Expert:
    """The donor that was described. known: text encoders in memory, which serve where they are equal"""
    encoders = []
    for component in described.text_encoders:
        encoder = component.load(dtype or torch.float32)
        where = described.files.get(component.name) or described.spec.named
        check_finite(encoder, f"the {component.name} of {where}")
        encoders.append(next((one for one in known if same_weights(one, encoder)), encoder))
    return described.expert(encoders)


def borrow_components(experts: Sequence[Expert], spec: DonorSpec, dtype: torch.dtype | None) -> Expert | None:
    """Give denoisers alone the text encoders, tokenizers and scheduler of a donor.

    spec: of the donor; empty: their own files, and the first expert that has text encoders
    Returns the donor; None if no expert needs one, or there is none, and denoisers alone stay what they are.
    Raises UserError for a donor that lacks parts, or that no expert needs.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if spec and not bare:
        raise unneeded(spec)
    whole = None if spec else next((expert for expert in experts if expert.text_encoders), None)
    has_vae = next((expert.name for expert in experts if expert.has_vae), None)
    spec = replace(spec, vae=spec.vae or has_vae, files=spec.files or files_of(bare))
    donors: dict[tuple[Path, ...], Expert] = {}  # by the file with text encoders of an expert's own
    for expert in bare:
        asked, own = _asked(expert, spec, whole), () if shares_texts(expert) else files_of([expert])
        own = own if any(map(text_encoders_beside, own)) else ()
        if own not in donors and asked is not None:
            known = [encoder for one in experts for encoder in one.text_encoders]
            described = describe_donor(asked, expert)
            donors[own] = _loaded(described, dtype, known)
            for file in files_of(bare) if shares_texts(expert) else ():
                described.warn_of_unread(file)
        donor = donors.get(own, whole)
        if donor is None:
            return None
        expert.donor = donor
        expert.text_encoders, expert.tokenizers = list(donor.text_encoders), list(donor.tokenizers)
        expert.scheduler = expert.scheduler or donor_scheduler(expert, donor.scheduler)
        _check_options(expert, donor)
        expert.pipeline_options = dict(donor.pipeline_options)
    return whole or next(iter(donors.values()), None) if bare else None


def _asked(expert: Expert, spec: DonorSpec, whole: Expert | None) -> DonorSpec | None:
    """What is asked of the donor of a denoiser alone; None: a whole pipeline lends all, or nobody does.

    spec:  what the user gives, and the experts' files
    whole: the first expert that has text encoders, if the user gives nothing
    """
    if spec:
        return spec
    if whole is None:
        alone = any(map(text_encoders_beside, spec.files)) and gather(spec, expert).lacking is None
        return spec if alone else None
    own = [file for file in files_of([expert]) if text_encoders_beside(file)]
    if not own or shares_texts(expert) or whole.located is None or whole.located.single_file:
        for file in own:
            warn_once(f"the text encoders in {file} are not read: expert '{whole.name}' lends its own")
        return None
    return replace(spec, frame=str(whole.located.path))


def _check_options(expert: Expert, donor: Expert) -> None:
    """Raise UserError if a transformer's file is said to be another model than the pipeline that it joins."""
    if not expert.pipeline_options:
        return
    settings = replace(expert, pipeline_options=donor.pipeline_options).settings
    for name in FAMILIES[expert.family].interface.pipeline_settings:
        its, expected = expert.settings.get(name), settings.get(name)
        if its != expected:
            raise UserError(
                f"expert '{expert.name}' is read as a model with {name} {its}, and '{donor.name}', which "
                f"lends it text encoders and scheduler, has {expected}; give the pipeline of its own kind "
                "with --frame, or the config of that pipeline with --config"
            )


def unneeded(spec: DonorSpec) -> UserError:
    """The error for a donor where all experts have text encoders."""
    return UserError(
        f"{spec.named} gives components to experts that are denoisers alone, and all of these bring "
        "their own; leave it out, or choose another VAE with vae (--vae)"
    )


def lend(
    descriptions: Sequence[ExpertDescription], spec: DonorSpec, config: str | None
) -> list[ExpertDescription]:
    """The descriptions, those of denoisers alone with the parts that a donor gives them.

    Where the user gives nothing, the first whole pipeline lends its text encoders, or else what lies in an
    expert's file is described, even if parts are missing.
    config: of a VAE that is a single file
    Raises UserError as describe_donor does, for a VAE that does not fit, and for a donor that none needs.
    """
    bare = [one.expert for one in descriptions if not one.text_parts]
    if spec and not bare:
        raise unneeded(spec)
    whole = None if spec else next((one for one in descriptions if one.text_parts), None)
    has_vae = next((one.name for one in descriptions if "vae" in one.components), None)
    spec = replace(spec, vae=spec.vae or has_vae, files=spec.files or files_of(bare))
    return [one if one.text_parts else _lent(one, spec, whole, config) for one in descriptions]


def _lent(
    description: ExpertDescription, spec: DonorSpec, whole: ExpertDescription | None, config: str | None
) -> ExpertDescription:
    expert = description.expert
    asked = _asked(expert, spec, None if whole is None else whole.expert)
    if asked is None and whole is not None:
        texts = {name: whole.components[name] for name in whole.text_parts}
        return replace(
            description,
            components=description.components | texts,
            tokenizers=whole.tokenizers,
            index=description.index or whole.index,
            scheduler=description.scheduler or donor_scheduler(expert, whole.scheduler),
        )
    if asked is None:
        if not any(map(text_encoders_beside, spec.files)):
            return description
        found = gather(spec, expert)
        return replace(
            description, components=description.components | found.components, lacking=found.lacking
        )
    found = describe_donor(asked, expert)
    components = {**description.components, **found.components}
    if spec.vae is not None and exists(spec.vae):
        components["vae"] = describe_vae(
            locate(ExpertSpec("vae", spec.vae)), config, replace(expert, donor=found.expert([]))
        )
    return replace(
        description,
        components=components,
        tokenizers=found.tokenizers,
        index=description.index or found.index,
        scheduler=description.scheduler or donor_scheduler(expert, found.scheduler),
    )


def donor_scheduler(expert: Expert, scheduler: Any) -> Any:
    """A donor's scheduler, changed to the kind of prediction that the expert's own file names."""
    if scheduler is None:
        return None
    return predicting(scheduler, expert.prediction, f"expert '{expert.name}'")
