"""The dtypes of weights, by their codes in .safetensors headers and by torch's names."""

import torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# of 8 bits; torch converts them
SMALL_FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
BITS = (
    {
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "C64": 64,
        "F32": 32,
        "I32": 32,
        "U32": 32,
        "F16": 16,
        "BF16": 16,
        "I16": 16,
        "U16": 16,
    }
    | {"I8": 8, "U8": 8, "BOOL": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
    | dict.fromkeys(SMALL_FLOATS, 8)
)


def is_float(dtype: str) -> bool:
    """Return True for a floating-point dtype that torch can convert, by its name in a header or in torch."""
    return dtype in DTYPES or dtype in DTYPES.values() or dtype in SMALL_FLOATS
