"""An ensemble while ComfyUI samples: the wrapper around its sampling, and the one around its network.

ComfyUI loads all experts' models beside the first one's. Where it would call the first network, all experts'
blocks run in the loop of every other ensemble (`afa/denoiser/forward.py`).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from afa.aggregators.registry import Recipe
from afa.comfyui.network import NetworkReader, Options
from afa.comfyui.patches import check_patches, options_of_expert
from afa.comfyui.texts import calls_of_experts
from afa.denoiser.forward import ParallelStages, run_stages
from afa.denoiser.strengths import Active, Strength, changes, factor_maps, for_rows, rescaled
from afa.errors import UserError

KEY = "afa"  # of what is put on a MODEL of ComfyUI
STRENGTHS = "afa_strengths"  # of AFA Strength, in transformer_options
KEPT = 4  # samplings whose weight maps are kept


@dataclass
class SamplerRun:
    """One sampling.

    patchers:  of each expert, as they are loaded
    strengths: with the highest and the lowest sigma at which each holds
    shape:     of the latents
    stages:    of all experts, read at the first pass
    sums:      of the weights with the prompt, by stage: (B, N, H, W) on the device
    passes:    number of summands
    guided:    the weights of the last pass with the prompt and its sigma, by stage
    factors:   maps of strengths, by those that hold and the size
    """

    patchers: Sequence[Any]
    strengths: Sequence[tuple[Strength, float, float]]
    shape: torch.Size
    stages: Sequence[ParallelStages] | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    guided: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    factors: dict[tuple[Active, tuple[int, ...]], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network.

    prompted: for each prompt of the batch, whether it is a positive one
    sigma:    noise level
    active:   strengths that hold
    size:     of the latents, height and width
    """

    prompted: Sequence[bool]
    sigma: float
    active: Active
    size: tuple[int, ...]


@dataclass(eq=False)
class RunningEnsemble:
    """The trained part of an ensemble, and how it runs on ComfyUI's models.

    names:       of the experts
    reader:      of their networks
    aggregators: stage -> aggregator
    recipe:      of the aggregators
    places:      for each expert, the place of its model in [the MODEL itself, *its additional models]
    entered:     transformer_options of the first MODEL when it entered
    patched:     patches of the first MODEL's weights when it entered
    results:     the last samplings: latents, and mean weights by stage, (B, N, H, W)
    """

    names: tuple[str, ...]
    reader: NetworkReader
    aggregators: nn.ModuleDict
    recipe: Recipe
    places: Sequence[int]
    entered: Options
    patched: Any
    results: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    sampling: SamplerRun | None = None

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap ComfyUI's outer_sample: find the experts' models, and keep the weights of this sampling."""
        guider = executor.class_obj
        self._check(guider)
        patcher = guider.model_patcher
        patchers = [patcher, *patcher.get_additional_models_with_key(KEY)]
        to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
        given = guider.model_options["transformer_options"].get(STRENGTHS, ())
        noise = args[0] if args else kwargs["noise"]
        before, self.sampling = (
            self.sampling,
            SamplerRun(
                [patchers[place] for place in self.places],
                [(one, float(to_sigma(one.start)), float(to_sigma(one.end))) for one in given],
                noise.shape,
            ),
        )
        try:
            latents: Tensor = executor(*args, **kwargs)
            means = {
                name: (total / self.sampling.passes[name]).cpu() for name, total in self.sampling.sums.items()
            }
            self.results[:] = [*self.results[1 - KEPT :], (latents.cpu(), means)]
            return latents
        finally:
            self.sampling = before

    def _check(self, guider: Any) -> None:
        """Raise UserError for what would reach the first expert alone, or would be left out."""
        if patches_of(guider.model_patcher) != self.patched:
            raise UserError(
                "a node after AFA Ensemble patches weights (a LoRA?), which would reach the first expert "
                "alone; put it between the loader and AFA Ensemble, for each expert that it is meant for"
            )
        if guider.model_patcher.get_additional_models_with_key("multigpu"):
            raise UserError(
                "the passes of a step are divided among GPUs, which an ensemble does not do; "
                "leave out the node that divides them (MultiGPU CFG Split)"
            )
        conditions = {name: list(found) for name, found in guider.conds.items()}
        if any(one.get("hooks") for found in conditions.values() for one in found):
            raise UserError(
                "a CONDITIONING has hooks (a LoRA of its own), which would reach the first expert alone; "
                "leave them out"
            )
        prompts = len(conditions.get("positive", ()))
        if self.recipe.shared_guidance and prompts > 1:
            raise UserError(
                "this ensemble gives both predictions of guidance the weights of the one with the prompt, "
                f"and there are {prompts} prompts; give one"
            )

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap the forward of the first network: run the blocks of all experts instead."""
        inside = executor.wrappers[executor.idx + 1 :]
        if inside:
            raise UserError(
                f"a node after AFA Ensemble wraps the network ({inside[0].__module__}), which an ensemble "
                "replaces; put it before AFA Ensemble, or leave it out"
            )
        return self._predicted(executor.original, *args, **kwargs)

    def apply(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap ComfyUI's call of a network that runs no wrappers: replace its forward in this call."""
        network = executor.class_obj.diffusion_model
        own, forward = vars(network).get("forward"), network.forward
        network.forward = partial(self._predicted, forward)
        try:
            prediction: Tensor = executor(*args, **kwargs)
            return prediction
        finally:
            del network.forward
            if own is not None:  # of a compiled network
                network.forward = own

    def _predicted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the blocks of all experts instead of a forward with these arguments."""
        if self.sampling is None:
            raise UserError(
                "an AFA ensemble runs inside ComfyUI's samplers only; connect its MODEL to a sampler"
            )
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
        call = {**bound, **bound.pop("kwargs", {})}
        with torch.no_grad():
            return self._run(call)

    def _run(self, call: dict[str, Any]) -> Tensor:
        """Run one pass. call: arguments of the forward, by name"""
        sampling = self.sampling
        assert sampling is not None
        runtime, x = call["transformer_options"], call["x"]
        check_patches(runtime, "the ensemble's MODEL")
        networks = [network_of(patcher) for patcher in sampling.patchers]
        if sampling.stages is None:
            sampling.stages = list(zip(*map(self.reader.stages, networks), strict=True))
        self.aggregators.to(x.device)  # ComfyUI may have left parts where memory is short
        calls = calls_of_experts(call, len(networks))
        begun = [
            self.reader.begin(network, own, self._options(place, patcher, runtime))
            for network, own, place, patcher in zip(
                networks, calls, self.places, sampling.patchers, strict=True
            )
        ]
        hidden, contexts = zip(*begun, strict=True)
        current = self._pass(runtime, x)
        options = self.reader.control([stage[0] for stage in sampling.stages], call)
        options.fuse_text = self.recipe.text_stream == "fused"
        options.adjust = lambda stage, weights: self._adjusted(stage, weights, current)
        options.observe = lambda stage, weights: self._observe(stage, weights, current)
        prediction = run_stages(sampling.stages, dict(self.aggregators.items()), hidden, contexts, options)
        return self.reader.end(prediction, call)

    def _options(self, place: int, patcher: Any, runtime: Options) -> Options:
        """Return the options of an expert's blocks, with its own patches and those of the ensemble."""
        if place == 0:
            return dict(runtime)
        return options_of_expert(runtime, self.entered, patcher.model_options["transformer_options"])

    def _pass(self, runtime: Options, x: Tensor) -> NetworkCall:
        assert self.sampling is not None
        sigma = float(runtime["sigmas"].flatten()[0])
        active = tuple(one for one, high, low in self.sampling.strengths if high >= sigma >= low)
        size = tuple(x.shape[-2:])
        if size != tuple(self.sampling.shape[-2:]) and any(one.mask is not None for one in active):
            raise UserError(
                "AFA Strength with a mask does not know where in the picture a prompt's area lies; "
                "leave out the mask, or Conditioning (Set Area)"
            )
        return NetworkCall([place == 0 for place in runtime["cond_or_uncond"]], sigma, active, size)

    def _adjusted(self, stage: str, weights: Tensor, current: NetworkCall) -> Tensor:
        """Return the weights (R, N, H, W) of a stage, shared by both predictions of guidance and scaled."""
        assert self.sampling is not None
        if self.recipe.shared_guidance:
            weights = self._shared(stage, weights, current)
        if not changes(current.active):
            return weights
        size = (weights.shape[-2], weights.shape[-1])
        found = self.sampling.factors.get((current.active, size))
        if found is None:
            found = factor_maps(current.active, self.names, size).to(weights.device)
            self.sampling.factors[current.active, size] = found
        passes = len(current.prompted)
        return rescaled(weights, for_rows(found, self.sampling.shape[0], passes, len(weights)))

    def _shared(self, stage: str, weights: Tensor, current: NetworkCall) -> Tensor:
        """Give all predictions the weights of the one with the prompt, which may be of the pass before."""
        assert self.sampling is not None
        guided, count = self.sampling.guided, len(current.prompted)
        if any(current.prompted):
            guided[stage] = current.sigma, weights.chunk(count)[list(current.prompted).index(True)]
        sigma, prompted = guided.get(stage, (None, weights))
        if (
            sigma != current.sigma
            or len(prompted) * count != len(weights)
            or prompted.shape[1:] != weights.shape[1:]
        ):
            raise UserError(
                "this ensemble gives both predictions of guidance the weights of the one with the prompt, "
                "and the pass without the prompt comes first, or is of another size; take a sampler with one "
                "positive and one negative prompt for the whole picture"
            )
        return torch.cat([prompted] * count)

    def _observe(self, stage: str, weights: Tensor, current: NetworkCall) -> None:
        """Add the weights (B, N, H, W) of predictions with the prompt for the whole picture to the sums."""
        assert self.sampling is not None
        sums, passes = self.sampling.sums, self.sampling.passes
        if current.size != tuple(self.sampling.shape[-2:]):
            return
        for part, prompted in zip(
            weights.float().chunk(len(current.prompted)), current.prompted, strict=True
        ):
            if prompted:
                sums[stage] = sums[stage] + part if stage in sums else part.clone()
                passes[stage] = passes.get(stage, 0) + 1


def patches_of(patcher: Any) -> Any:
    """Return what patches the weights of a MODEL, to compare; patches_uuid changes with hooks, too."""
    by_weight = {name: len(found) for name, found in patcher.patches.items()}
    wrapped = {name: len(found) for name, found in patcher.weight_wrapper_patches.items()}
    return by_weight, wrapped, patcher.object_patches.get("manual_cast_dtype")


def network_of(patcher: Any) -> Any:
    """Return the network of a MODEL; of a compiled one, the network that was compiled."""
    network = patcher.model.diffusion_model
    return getattr(network, "_orig_mod", network)


def ensemble_on(patcher: Any) -> RunningEnsemble:
    """Return the ensemble that a MODEL is. Raises UserError for a MODEL that is none."""
    found = patcher.get_attachment(KEY)
    if not isinstance(found, RunningEnsemble):
        raise UserError("this MODEL is no ensemble; connect the output of AFA Ensemble")
    return found
