"""Store the matrices of a single file in 8 bits with scales beside them, as ComfyUI does, and undo it by the formula."""

import json

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}
SPELLINGS = ("old", "bare", "noted", "header")  # scale_weight and a mark; weight_scale alone, with comfy_quant, or with a note in the header


def scale_of(weight: Tensor, kind: torch.dtype, form: str) -> Tensor:
    """form: scalar, one, rows, columns (rows as a column), blocks (2 × 2 of them)"""
    largest = weight.float().abs().clamp(min=1e-6) / LARGEST[kind]
    rows, columns = weight.shape[0], weight[0].numel()
    if form in ("rows", "column"):
        return largest.reshape(rows, -1).amax(1).reshape((-1,) if form == "rows" else (-1, 1))
    if form == "blocks":
        return largest.reshape(2, rows // 2, 2, columns // 2).amax((1, 3))
    return largest.amax().reshape(() if form == "scalar" else (1,))


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """The scale of every single number."""
    if scale.numel() == 1:
        return scale.reshape(()).expand(weight.shape)
    if scale.ndim == 2 and scale.shape[1] > 1:
        return torch.kron(scale, torch.ones([size // 2 for size in weight.shape]))
    return scale.reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)


def stored(tensors: dict[str, Tensor], kind: torch.dtype = torch.float8_e4m3fn, spelling: str = "bare", form: str = "scalar", prefix: str = ""):
    """Returns the tensors of such a file, its metadata, and what its weights are.

    Every second matrix stays as it is. prefix: of the mark in the old spelling
    """
    found, wanted, notes = {}, {}, {}
    matrices = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim > 1][::2]
    for name, tensor in tensors.items():
        found[name] = wanted[name] = tensor
        if name not in matrices:
            continue
        own = form if form != "blocks" or (tensor.ndim == 2 and not any(size % 2 for size in tensor.shape)) else "rows"
        scale, layer = scale_of(tensor, kind, own), name.removesuffix(".weight")
        exact = tensor.float() / spread(scale, tensor)
        found[name] = exact.round().to(kind) if kind == torch.int8 else exact.to(kind)
        wanted[name] = found[name].float() * spread(scale, tensor)
        found[f"{layer}.{'scale_weight' if spelling == 'old' else 'weight_scale'}"] = scale
        found[f"{layer}.{'scale_input' if spelling == 'old' else 'input_scale'}"] = torch.tensor(0.3)
        notes[layer] = {"format": FORMATS[kind], "full_precision_matrix_mult": True}
    if spelling == "old":
        found[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=kind)
    if spelling == "noted":
        text = {layer: torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8) for layer, note in notes.items()}
        found |= {f"{layer}.comfy_quant": note for layer, note in text.items()}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": notes})} if spelling == "header" else {}
    return found, header, wanted
