"""Reads LoRA files of all programs into one form: PEFT's names, two factors per layer, alpha multiplied in.

The keys may be those of kohya's scripts, diffusers, PEFT, ComfyUI, OneTrainer or XLabs. The layer of a key is
looked up in the model, so nothing depends on the size of a model. Each layer adds alpha / rank · up @ down to
its weight, with its own rank and alpha; without an alpha it adds up @ down.

Deviation: diffusers 0.42 gives the attention layers of kohya's files the most frequent alpha of the file,
since its pattern of the other alphas is for modules `attn1.processor.to_q_lora`, which do not exist.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.stages.original_names import Layers

FACTOR = re.compile(r"(.+?)[._]lora([12]?)(?:_linear_layer)?[._](down|up|A|B)(?:\.[^.]+)?\.(weight|bias)")
MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?")
ALPHA = re.compile(r"(.+?)(?:\.lora)?\.alpha")
ROLES = {"down": "down", "A": "down", "up": "up", "B": "up"}
DENOISER, ANY, LAST = "denoiser", "any", "last text encoder"
PREFIXES = {
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "diffusion_model.": DENOISER,
    "model.diffusion_model.": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": LAST,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": LAST,
}
# names in early versions of diffusers -> names today
RENAMED = {"to_out": "to_out.0", "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj"}
# Ends of names of differences that no adapter holds; they can be part of an expert's weights, see
# afa/experts/lora_differences.py.
DIFFERENCES = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale|lora_mid|diff|diff_b"
# Other files that people share as LoRAs: a pattern of their keys, and the end of the sentence "LoRA FILE …".
OTHER_KINDS = (
    (r"\.hada_", "is a LoHa (LyCORIS)"),
    (r"\.lokr_", "is a LoKr (LyCORIS)"),
    (r"\.(oft_|boft_)", "is an OFT (LyCORIS)"),
    (r"\.on_input$", "is an IA3 (LyCORIS)"),
    (r"\.(dora_scale|weight_decompose)", "is a DoRA in kohya's form"),
    (r"\.lora_mid\.", "is a LoCon with a core tensor (LyCORIS)"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "holds a full difference of weights (LyCORIS)"),
    (r"\.[ab][12]\.weight$", "is a GLoRA (LyCORIS)"),
    (r"scale_weight$|weight_scale$|scaled_fp8$|quant_map$|absmax$", "holds quantised weights with scales"),
    (r"^lora_controlnet$", "is a Control-LoRA"),
    (r"^bundle_emb\.|string_to_param|^emb_params$|^clip_[gl]$", "holds an embedding (a textual inversion)"),
    (
        r"^first_stage_model\.|^conditioner\.|^cond_stage_model\.|^model\.diffusion_model\.(?!.*\.lora_)",
        "is a whole checkpoint",
    ),
)


@dataclass
class Found:
    """The tensors of one layer of a file, as the file has them.

    keys: keys of these tensors; messages show the first
    """

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    alpha: Tensor | float | None = None
    keys: list[str] = field(default_factory=list)


def lora_states(
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, nn.Module],
    what: str,
    where: str,
    originals: Callable[[Any], Mapping[str, Layers]],
    config: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Convert the tensors of a LoRA file to PEFT's names, for each part of a pipeline.

    tensors:     key in the file -> tensor; tensors on the meta device are only compared with the model
    parts:       name in a pipeline -> model: the denoiser first, then text encoders
    what, where: the file and the model, for messages
    originals:   denoiser -> the original names of its layers, see original_layers
    config:      settings that PEFT or diffusers recorded: lora_alpha, alpha_pattern, use_rslora; keys may
                 begin with a part's name and a dot
    Returns part -> tensors by name; each layer adds up @ down, without a further factor.
    Raises UserError for a file that is no plain LoRA, does not fit, or holds numbers that are not finite.
    """
    found = _grouped(tensors, what)
    names = {part: Names(module, originals) for part, module in parts.items()}
    places = _places(found, names, what, where)
    states: dict[str, dict[str, Tensor]] = {}
    for key, layer in found.items():
        part, layers = places[key]
        state = states.setdefault(part, {})
        if layer.alpha is None:
            layer.alpha = _recorded(config or {}, part, layers.names[0], layer, what)
        for name, tensor in _factors(layer, layers, names[part], what, where):
            if name in state:
                raise UserError(
                    f"{what} holds layer {name.rpartition('.lora_')[0]} of the {part} twice "
                    f"(once as {layer.keys[0]})"
                )
            state[name] = tensor
    return {part: _completed(state, what) for part, state in states.items()}


def _grouped(tensors: Mapping[str, Tensor], what: str) -> dict[str, Found]:
    """Group the tensors by their layer's name in the file. Raises UserError for what is no plain LoRA."""
    if not tensors:
        raise UserError(f"{what} is empty: it holds no tensor")
    found: dict[str, Found] = {}
    for pattern, kind in OTHER_KINDS:
        key = next((key for key in tensors if re.search(pattern, key)), None)
        if key is not None:
            part = re.search(rf"\.({DIFFERENCES})(\.weight)?$", key)
            advice = f"{'give it as part of an expert, base+FILE, or ' if part else ''}take a plain LoRA"
            raise UserError(f"{what} {kind} ({key}), which is not supported here; {advice}")
    for key, tensor in tensors.items():
        if match := FACTOR.fullmatch(key):
            layer, role = match[1] + match[2], ROLES[match[3]] if match[4] == "weight" else "bias"
        elif match := MAGNITUDE.fullmatch(key):
            layer, role = match[1], "magnitude"
        elif match := ALPHA.fullmatch(key):
            layer, role = match[1], "alpha"
        else:
            some = any(FACTOR.fullmatch(other) for other in tensors)
            besides = (
                f"holds {key} besides its LoRA, and that would be lost"
                if some
                else f"holds no LoRA (its first key is {key})"
            )
            raise UserError(f"{what} {besides}; take a plain LoRA")
        one = found.setdefault(layer, Found())
        if getattr(one, role) is not None:
            raise UserError(f"{what} holds {key} twice, under two names")
        if role != "alpha" and not tensor.is_floating_point():
            raise UserError(
                f"{what}: {key} is of type {tensor.dtype}, expected floating point; take a plain LoRA"
            )
        setattr(one, role, tensor)
        one.keys.append(key)
    return found


class Names:
    """The layers of a model that can have a LoRA, under all their names."""

    def __init__(self, model: Any, originals: Callable[[Any], Mapping[str, Layers]]) -> None:
        self.model, self.originals = model, originals
        self.dtype: torch.dtype = model.dtype  # diffusers looks through the whole model for it
        modules = {name: getattr(module, "base_layer", module) for name, module in model.named_modules()}
        inner = re.compile(r"\.base_layer$|\.lora_[A-Za-z]")
        self.layers = {
            name: module
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not inner.search(name)
        }

    @cached_property
    def known(self) -> dict[str, Layers]:
        """Name of a layer, with dots or with underscores instead of dots -> its layers in diffusers."""
        found: dict[str, Layers] = {}
        for name in self.layers:
            for old, new in RENAMED.items():
                if name.endswith(f".{new}"):
                    found[name.removesuffix(new) + old] = Layers((name,))
            if name.endswith(".out_proj"):
                found[name.removesuffix("out_proj") + "to_out"] = Layers((name,))
        if hasattr(self.model, "load_lora_adapter"):  # a denoiser; text encoders have one set of names
            found |= {
                old: new
                for old, new in self.originals(self.model).items()
                if set(new.names) <= set(self.layers)
            }
        found |= {name: Layers((name,)) for name in self.layers}
        found = {name.removeprefix("text_model."): layers for name, layers in found.items()}
        return {name.replace(".", "_"): layers for name, layers in found.items()} | found

    def find(self, name: str) -> Layers | None:
        """Return the layers for a name in a file; None if this model has no such layer."""
        name = name.replace(".processor", "").removeprefix("text_model.").removeprefix("text_model_")
        return self.known.get(name)


def _places(
    found: Mapping[str, Found], names: Mapping[str, Names], what: str, where: str
) -> dict[str, tuple[str, Layers]]:
    """Find the part and the layers of each layer of a file.

    Raises UserError for weights that find no place, and for layers that lack a factor.
    """
    places = {key: place_of(key, names) for key in found}
    lost = [one for key, layer in found.items() if places[key] is None for one in _weights(layer)]
    if lost:
        count = sum(len(_weights(layer)) for layer in found.values())
        missing = f"{len(lost)} of its {count} weights found no place (first: {lost[0]})"
        raise UserError(f"{what} does not fit {where}: {missing}; it was made for another architecture")
    for key, layer in found.items():
        factors = {"lora_up (lora_B)": layer.up, "lora_down (lora_A)": layer.down}
        lacks = [name for name, factor in factors.items() if factor is None]
        if lacks:
            lacking = lacks[0] if len(lacks) == 1 else "both factors"
            raise UserError(f"{what} is incomplete: layer {key} lacks {lacking}; download or export it again")
    return {key: place for key, place in places.items() if place is not None}


def _weights(layer: Found) -> list[str]:
    """Return the keys of a layer's tensors besides alpha."""
    return [key for key in layer.keys if not key.endswith(".alpha")]


def place_of(key: str, names: Mapping[str, Names]) -> tuple[str, Layers] | None:
    """Return the part and the layers for a name in a file; None if there are none."""
    key = key.removeprefix("base_model.model.")
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    kind, rest = PREFIXES.get(prefix, ANY), key.removeprefix(prefix)
    parts = list(names)
    chosen = {DENOISER: parts[:1], ANY: parts, LAST: parts[1:][-1:]}.get(kind, [kind])
    for part in chosen:
        layers = names[part].find(rest) if part in names else None
        if layers is not None:
            return part, layers
    return None


def _recorded(config: Mapping[str, Any], part: str, name: str, layer: Found, what: str) -> float | None:
    """Return a layer's alpha from the recorded settings; None if they have none.

    Raises UserError for settings that are not supported.
    """
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    own = own or {key: value for key, value in config.items() if "." not in key}
    if str(own.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        raise UserError(
            f"{what} is a {own['peft_type']} by its settings, which is not supported here; take a plain LoRA"
        )
    begun = str(own.get("init_lora_weights")).lower()
    if begun.startswith(("pissa", "olora", "corda")):
        raise UserError(
            f"{what} was begun with {begun} and fits only the weights that this left; "
            "convert it to a plain LoRA"
        )
    pattern = own.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise UserError(f"{what} records the alpha_pattern {pattern!r}, expected a table of layers")
    named = [value for key, value in pattern.items() if f".{name}".endswith(f".{str(key).removeprefix('^')}")]
    alpha = named[0] if named else own.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"{what} records the alpha {alpha!r}, expected a number")
    assert layer.down is not None
    return alpha * math.sqrt(layer.down.shape[0]) if own.get("use_rslora") is True else alpha


def _factors(
    layer: Found, layers: Layers, names: Names, what: str, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors under PEFT's names, with alpha / rank multiplied in, in the model's dtype.

    alpha / rank is divided between both factors (down gets a power of two), so that no factor becomes too
    small for half precision.
    """
    assert layer.down is not None and layer.up is not None
    first = layer.keys[0]
    modules = [names.layers[name] for name in layers.names]
    sizes = [
        module.out_features if isinstance(module, nn.Linear) else module.out_channels for module in modules
    ]
    down, up = _shaped(layer.down, layer.up, modules[0], sum(sizes), f"{what} does not fit {where}: {first}")
    rank = down.shape[0]
    alpha = rank if layer.alpha is None else one_number(layer.alpha, f"{what}: the alpha of {first}")
    scale = alpha / rank
    root = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
    if layers.swapped:
        up = torch.cat(tuple(reversed(up.chunk(2))))
    tensors = {"lora_A.weight": down.float() * root, "lora_B.weight": up.float() * (scale / root)}
    if layer.bias is not None:
        tensors["lora_B.bias"] = layer.bias.float() * scale
    if layer.magnitude is not None:
        tensors["lora_magnitude_vector"] = layer.magnitude.float()
    for end, tensor in tensors.items():
        tensor = _cast(tensor, names.dtype, f"{what}: {first}")
        shared = (
            end == "lora_A.weight" or len(modules) == 1
        )  # the rows of all others belong to one layer each
        pieces = [tensor] * len(modules) if shared else tensor.split(sizes)
        for name, piece in zip(layers.names, pieces, strict=True):
            yield f"{name}.{end}", piece


def _cast(tensor: Tensor, dtype: torch.dtype, start: str) -> Tensor:
    """Cast a tensor. Raises UserError if numbers are not finite, or not any more. start: of the message."""
    cast = tensor.to(dtype)
    if not tensor.is_meta and not torch.isfinite(cast).all():
        if torch.isfinite(tensor).all():
            raise UserError(f"{start} does not fit {dtype}; load the experts in float32")
        raise UserError(f"{start} holds NaN or infinity; it is broken, download or export it again")
    return cast


def _shaped(down: Tensor, up: Tensor, module: Any, rows: int, start: str) -> tuple[Tensor, Tensor]:
    """Return both factors in PEFT's shapes for this layer; sizes of 1 at the end do not matter.

    rows:  rows of `up`, the output size
    start: of the message
    Raises UserError for shapes that do not fit.
    """
    linear = isinstance(module, nn.Linear)
    kernel = () if linear else tuple(module.kernel_size)
    rank = down.shape[0] if down.ndim else 0
    columns = module.in_features if linear else module.in_channels
    wanted = (rank, columns, *kernel), (rows, rank, *(() if linear else (1, 1)))
    pairs = list(zip((down, up), wanted, strict=True))
    if not rank or any(_trimmed(tensor.shape) != _trimmed(shape) for tensor, shape in pairs):
        actual = f"{tuple(down.shape)} and {tuple(up.shape)}"
        expected = (
            f"(rank, {', '.join(map(str, wanted[0][1:]))}) and ({rows}, rank{'' if linear else ', 1, 1'})"
        )
        raise UserError(
            f"{start} and its other factor have shapes {actual}, expected {expected}; "
            "it was made for another architecture"
        )
    return down.reshape(wanted[0]), up.reshape(wanted[1])


def _trimmed(shape: Sequence[int]) -> list[int]:
    """Drop sizes of 1 after the second dimension of a shape."""
    return [*shape[:2], *(size for size in shape[2:] if size != 1)]


def one_number(alpha: Tensor | float, start: str) -> float:
    """Convert an alpha to a number. Raises UserError for anything but one finite number."""
    if isinstance(alpha, Tensor):
        if alpha.is_meta:
            return 1.0
        if alpha.numel() != 1:
            raise UserError(f"{start} has shape {tuple(alpha.shape)}, expected one number")
        alpha = alpha.float().item()
    if not math.isfinite(alpha):
        raise UserError(f"{start} is {alpha}, expected a finite number")
    return alpha


def _completed(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Give every layer a bias if one has a bias, as PEFT expects; missing ones are zeros.

    Raises UserError if only some layers have a magnitude, which cannot be filled in.
    """
    layers = [name.removesuffix(".lora_B.weight") for name in state if name.endswith(".lora_B.weight")]
    with_magnitude = sum(name.endswith(".lora_magnitude_vector") for name in state)
    if with_magnitude not in (0, len(layers)):
        raise UserError(
            f"{what} is a DoRA in {with_magnitude} of its {len(layers)} layers only, "
            "which is not supported here"
        )
    if any(name.endswith(".lora_B.bias") for name in state):
        for name in layers:
            up = state[f"{name}.lora_B.weight"]
            state.setdefault(f"{name}.lora_B.bias", torch.zeros(up.shape[0], dtype=up.dtype))
    return state
