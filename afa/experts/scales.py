"""Weights of single files that are stored in 8 bits with scales beside them, and what else is quantised.

What is undone exactly when a tensor is read (weight · scale, in float32):
* scaled fp8 as ComfyUI wrote it until 2025: `<layer>.scale_weight`, and one tensor `scaled_fp8` that says so;
* as it writes it today: `<layer>.weight_scale`, with or without a small JSON text of the layer's format, in
  `<layer>.comfy_quant` or in the header (`_quantization_metadata`). Formats: float8_e4m3fn, float8_e5m2, the
  same with a scale for each row or block, and int8_tensorwise (a scale for the tensor or for each row).
`scale_input` and `input_scale` are for activations, in programs that multiply in 8 bits: weights do without.
All other kinds are refused by name, since without their scales a loader reads wrong numbers.
Sources: ComfyUI, comfy/quant_ops.py and convert_old_quants in comfy/utils.py.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from afa.experts.dtypes import DTYPES, SMALL_FLOATS, is_float

ENDS = ("scale_weight", "weight_scale")  # of a scale's name, in the old spelling and in today's
ACTIVATIONS = ("scale_input", "input_scale")
MARK, NOTE, NOTED = "scaled_fp8", "comfy_quant", "_quantization_metadata"
LONGEST = 1 << 16  # bytes of one layer's comfy_quant
FP8 = tuple(f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fn_rowwise", "e4m3fn_blockwise"))
INT8 = "int8_tensorwise"
BLOCKS = ("F8_E8M0", "F8_E4M3", "U8")  # dtypes of the scales of 16 or 32 numbers, in an order of their own
# Parts of single files whose weights are in a form of their own: an average of the weights, which is never
# read, and each text encoder beside a transformer.
PART = re.compile(r"model_ema\.|text_encoders\.[^.]+\.")
# Tensors beside quantised weights, by the end of their names -> what quantises in this way.
KINDS = {
    r"wscales|wcscales|wtscale|smooth_factor": "SVDQuant (nunchaku)",
    r"weight_scale_2|pre_quant_scale": "nvfp4",
    r"(nested_)?absmax|(nested_)?quant_map|quant_state(\.\w+)?": "nf4 or fp4 of bitsandbytes",
    r"SCB|weight_format": "int8 of bitsandbytes",
    r"qweight|qzeros|g_idx": "GPTQ or AWQ",
    r"weight\._(data|scale|shift)": "quanto",
    r"weight\._qdata|qdata": "torchao",
    r"weight_packed|weight_global_scale|(weight_)?zero_point": "compressed-tensors",
    r"weight_zero|weight_s_rel|weight_s_channel|weight_codebook": "4 bits of ComfyUI",
    r"weight_scale_\w+|(input|output)_scale|scale_(input|weight)|weight_scale|scaled_fp8|comfy_quant": "",
}
PACKED = {re.compile(rf"(^|[._])({ends})$"): kind for ends, kind in KINDS.items()}
ANY = re.compile(rf"(^|[._])({'|'.join(KINDS)})$")  # most files have none, and thousands of tensors
PACKED_NOTES = ("quantization_config", "quantization")  # of a header's __metadata__


@dataclass(frozen=True)
class Scales:
    """What lies beside a file's weights.

    of:     name of a weight -> name of its scale
    beside: names of tensors that are no weights: scales, and notes about them
    """

    of: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()


class QuantisedError(ValueError):
    """Weights in a form that is not undone. Its text names a tensor, or an entry of the header."""


def find_scales(
    header: Mapping[str, Any], metadata: Mapping[str, str], content: Callable[[str], bytes], part: str = ""
) -> Scales:
    """Find the scales of a file's weights.

    header:   tensor's name -> dtype and shape, as in the file
    metadata: of the header
    content:  returns the bytes of a tensor
    part:     the one whose weights are looked at, see part_of
    Raises QuantisedError for weights whose form is not undone.
    """
    names = [name for name in header if part_of(name) == part]
    notes = [name for name in names if _ends(name, NOTE)]
    formats = {layer: note for layer, note in _noted(metadata).items() if part_of(layer) == part}
    formats |= {name.removesuffix(NOTE): _format(content(name), name) for name in notes}
    marks = [name.removesuffix(MARK) for name in names if _ends(name, MARK)]
    found: dict[str, str] = {}
    for name in names:
        end = next((end for end in ENDS if _ends(name, end)), None)
        if end is None:
            continue
        layer = name.removesuffix(end)
        weight = f"{layer}weight"
        if weight not in header or weight in found:
            raise QuantisedError(name)
        said = layer in formats or (end == ENDS[0] and layer.startswith(tuple(marks)))
        _check(header, weight, name, formats.get(layer, {}), said)
        found[weight] = name
    for layer, note in formats.items():
        weight = f"{layer}weight"
        if weight not in found and (weight in header or f"{layer}{NOTE}" in header or _other(note)):
            where = f"{layer}{NOTE}" if f"{layer}{NOTE}" in header else NOTED
            raise QuantisedError(f"{where}: {_other(note) or 'it lacks the scale of this layer'}")
    beside = {name for name in names if name in found.values() or _ends(name, MARK, NOTE, *ACTIVATIONS)}
    _check_others([name for name in names if name not in beside], header, metadata, found)
    return Scales(found, frozenset(beside))


def part_of(name: str) -> str:
    """What stands before a tensor's name if it is of a part with a form of its own; otherwise ''."""
    found = PART.match(name)
    return found[0] if found else ""


def undone(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight in float32, multiplied by its scale of a form that form_of knows."""
    exact = scale.float()
    form = form_of(weight.shape, exact.shape)
    if form == "tensor":
        return weight.float() * exact.reshape(())
    if form == "rows":
        return weight.float() * exact.reshape(-1, *[1] * (weight.ndim - 1))
    rows, columns = (size // blocks for size, blocks in zip(weight.shape, exact.shape, strict=True))
    return weight.float() * exact.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def form_of(weight: Sequence[int], scale: Sequence[int]) -> str | None:
    """What each number of a scale is for: the whole tensor, one of its rows, or one of the equal blocks of a
    matrix; None: it does not fit.

    weight, scale: their shapes
    """
    if prod(scale) == 1:
        return "tensor"
    if scale and weight and scale[0] == weight[0] == prod(scale):
        return "rows"
    if len(weight) != 2 or len(scale) != 2:
        return None
    return (
        "blocks" if all(most and size % most == 0 for size, most in zip(weight, scale, strict=True)) else None
    )


def _ends(name: str, *ends: str) -> bool:
    return name.rpartition(".")[2] in ends


def _noted(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The formats in a header: layer's name and a dot -> its settings."""
    if NOTED not in metadata:
        return {}
    try:
        layers = json.loads(metadata[NOTED])["layers"]
        return {f"{layer}.": _known(settings) for layer, settings in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise QuantisedError(f"{NOTED} in its __metadata__") from None


def _format(text: bytes, name: str) -> dict[str, Any]:
    """The settings in a layer's comfy_quant."""
    try:
        return _known(json.loads(text.decode()))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise QuantisedError(f"{name} holds no format") from None


def _known(settings: Any) -> dict[str, Any]:
    """The settings of a layer, whose format is a text. Raises TypeError for anything else."""
    if not isinstance(settings.get("format"), str):
        raise TypeError
    return dict(settings)


def _other(note: Mapping[str, Any]) -> str | None:
    """The format in a layer's settings, if it is not undone."""
    kind = note.get("format")
    if kind is None or kind in (*FP8, INT8):
        return "int8_tensorwise with convrot" if note.get("convrot") else None
    return f"{kind:.60}"


def _check(header: Mapping[str, Any], weight: str, name: str, note: Mapping[str, Any], said: bool) -> None:
    """Raise QuantisedError for a weight and a scale that do not belong together in a known way."""
    if _other(note):
        raise QuantisedError(f"{name}: {_other(note)}")
    kind, scale = header[weight]["dtype"], header[name]["dtype"]
    known = note.get("format") == INT8 if kind == "I8" else kind in SMALL_FLOATS or (said and is_float(kind))
    if scale not in DTYPES:
        raise QuantisedError(
            f"{name} in {scale}: mxfp8 or nvfp4" if scale in BLOCKS else f"{name} in {scale}"
        )
    if not known:
        raise QuantisedError(f"{name} beside {kind}")
    shapes = header[weight]["shape"], header[name]["shape"]
    form = form_of(*shapes)
    if form is None or (form == "blocks" and kind == "I8"):
        raise QuantisedError(f"{name} of shape {shapes[1]!r:.60} beside {shapes[0]!r:.60}")


def _check_others(
    names: Sequence[str], header: Mapping[str, Any], metadata: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Raise QuantisedError if any of the other tensors show a kind that is not undone."""
    packed = [name for name in names if ANY.search(name)]
    for pattern, kind in PACKED.items():
        name = next((name for name in packed if pattern.search(name)), None)
        if name is not None:
            raise QuantisedError(f"{name}: {kind}" if kind else name)
    for name in PACKED_NOTES:
        if name in metadata:
            raise QuantisedError(f"{name} in its __metadata__")
    for name in names:
        kind = header[name]["dtype"]
        if name.endswith(("weight", "bias")) and name not in found and not is_float(kind):
            raise QuantisedError(f"{name} in {kind}")
