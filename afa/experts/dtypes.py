"""The dtypes of weights, by their names in files and by torch's."""

import torch

# in .safetensors headers and in GGUF files -> torch's
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
# Blocks of GGUF files, by ggml's names: the number of the type, how many weights a block has, and its bytes.
GGUF_BLOCKS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "IQ1_M": (29, 256, 56),
}


def is_float(dtype: str) -> bool:
    """Return True for weights that are read as floating point, by their dtype in a file or in torch."""
    return dtype in DTYPES or dtype in DTYPES.values() or dtype in SMALL_FLOATS or dtype in GGUF_BLOCKS
