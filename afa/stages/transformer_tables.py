"""What publishers of transformers call their layers: original name -> diffusers' names, in the order of rows.

Names that are the same are written too: programs that write LoRAs in kohya's form know every layer by its
original name. Sources: black-forest-labs flux and flux2, Stability-AI sd3.5, XLabs' LoRAs of FLUX (qkv1,
proj2 …), and for the others what diffusers' converters of single files read (lodestones' Chroma; Z-Image,
Krea 2, Lumina 2 and Qwen-Image 2.1 as ComfyUI has them). Qwen-Image's names are diffusers'.
"""

# FLUX.1, FLUX.2 and SD3: original name -> diffusers' names, in a block and outside
_QKV, _ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
FLUX_DOUBLE = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "qkv1": _QKV,
    "qkv2": _ADDED,
    "proj1": ("attn.to_out.0",),
    "proj2": ("attn.to_add_out",),
}
FLUX_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "qkv": _QKV,
    "proj": ("proj_out",),
}
FLUX2_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}
SD3_BLOCK = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in _QKV),
    "context_block.attn.qkv": _ADDED,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
Z_IMAGE_BLOCK: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    **{
        name: (name,) for name in ("adaLN_modulation.0", *(f"feed_forward.w{number}" for number in (1, 2, 3)))
    },
}
KREA2_BLOCK: dict[str, tuple[str, ...]] = {
    **{f"attn.w{letter}": (f"attn.to_{letter}",) for letter in "qkv"},
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    **{f"mlp.{name}": (f"ff.{name}",) for name in ("gate", "up", "down")},
}
QWEN_IMAGE_21_BLOCK: dict[str, tuple[str, ...]] = {
    "img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj"),
    **{name: (name,) for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.out")},
}
QWEN_IMAGE_BLOCK: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        *(f"attn.to_{letter}" for letter in "qkv"),
        *(f"attn.add_{letter}_proj" for letter in "qkv"),
        *("attn.to_out.0", "attn.to_add_out"),
        *(f"{kind}_{layer}" for kind in ("img", "txt") for layer in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
    )
}
_LUMINA2_LAYER: dict[str, tuple[str, ...]] = {
    "attention.qkv": _QKV,
    "attention.out": ("attn.to_out.0",),
    **{f"feed_forward.w{number}": (f"feed_forward.linear_{number}",) for number in (1, 2, 3)},
}
LUMINA2_BLOCK = _LUMINA2_LAYER | {"adaLN_modulation.1": ("norm1.linear",)}
# family -> (diffusers' name of a list of blocks, its original name, the names in a block) …
BLOCKS = {
    "flux": (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
    ),
    "flux2": (
        ("transformer_blocks", "double_blocks", FLUX2_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX2_SINGLE),
    ),
    "sd3": (("transformer_blocks", "joint_blocks", SD3_BLOCK),),
    "chroma": (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
        (
            "distilled_guidance_layer.layers",
            "distilled_guidance_layer.layers",
            {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
        ),
    ),
    "z-image": tuple((name, name, Z_IMAGE_BLOCK) for name in ("noise_refiner", "context_refiner", "layers")),
    "krea2": (
        ("transformer_blocks", "blocks", KREA2_BLOCK),
        ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", KREA2_BLOCK),
        ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", KREA2_BLOCK),
    ),
    "qwen-image": (("transformer_blocks", "transformer_blocks", QWEN_IMAGE_BLOCK),),
    "qwen-image-2.1": (("transformer_blocks", "transformer_blocks", QWEN_IMAGE_21_BLOCK),),
    "lumina2": (
        ("noise_refiner", "noise_refiner", LUMINA2_BLOCK),
        ("context_refiner", "context_refiner", _LUMINA2_LAYER),
        ("layers", "layers", LUMINA2_BLOCK),
    ),
}
_EMBEDDER = "time_text_embed.{}_embedder.linear_{}"
_LAST = {"final_layer.adaLN_modulation.1": ("norm_out.linear",), "final_layer.linear": ("proj_out",)}
ENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        **{
            f"{old}_in.{layer}_layer": (_EMBEDDER.format(new, number),)
            for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        "txt_in": ("context_embedder",),
        "img_in": ("x_embedder",),
        **_LAST,
    },
    "flux2": {
        **{
            f"{old}_in.{layer}_layer": (f"time_guidance_embed.{new}_embedder.linear_{number}",)
            for old, new in (("time", "timestep"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        **{
            f"{kind}.lin": (f"{kind}.linear",)
            for kind in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        },
        "txt_in": ("context_embedder",),
        "img_in": ("x_embedder",),
        **_LAST,
    },
    "sd3": {
        **{
            f"{old}_embedder.mlp.{2 * number - 2}": (_EMBEDDER.format(new, number),)
            for old, new in (("t", "timestep"), ("y", "text"))
            for number in (1, 2)
        },
        "x_embedder.proj": ("pos_embed.proj",),
        **_LAST,
    },
    "chroma": {
        "txt_in": ("context_embedder",),
        "img_in": ("x_embedder",),
        "final_layer.linear": ("proj_out",),
        **{
            name: (name,)
            for name in ("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj")
        },
    },
    "z-image": {
        "x_embedder": ("all_x_embedder.2-1",),
        **{
            f"final_layer.{name}": (f"all_final_layer.2-1.{name}",)
            for name in ("linear", "adaLN_modulation.1")
        },
        **{name: (name,) for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    },
    "krea2": {
        "first": ("img_in",),
        "tmlp.0": ("time_embed.linear_1",),
        "tmlp.2": ("time_embed.linear_2",),
        "tproj.1": ("time_mod_proj",),
        "txtmlp.1": ("txt_in.linear_1",),
        "txtmlp.3": ("txt_in.linear_2",),
        "txtfusion.projector": ("text_fusion.projector",),
        "last.linear": ("final_layer.linear",),
    },
    "qwen-image": {
        name: (name,)
        for name in (
            *(_EMBEDDER.format("timestep", number) for number in (1, 2)),
            "img_in",
            "txt_in",
            "norm_out.linear",
            "proj_out",
        )
    },
    "lumina2": {
        **{
            f"t_embedder.mlp.{2 * number - 2}": (f"time_caption_embed.timestep_embedder.linear_{number}",)
            for number in (1, 2)
        },
        "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
        "x_embedder": ("x_embedder",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
        "final_layer.linear": ("norm_out.linear_2",),
    },
    "qwen-image-2.1": {
        name: (name,)
        for name in (
            *(_EMBEDDER.format("timestep", number) for number in (1, 2)),
            "txt_in.in_layer",
            "txt_in.out_layer",
            "img_in",
            "modulation.1",
            "norm_out.linear",
            "proj_out",
        )
    },
}

FLUX_NORMS = [
    (
        rf"{kind}transformer_blocks\.(\d+)\.attn\.norm_{added}{letter}\.weight",
        rf"{place}norm.{word}_norm.scale",
    )
    for kind, added, place in (
        ("", "", r"double_blocks.\1.img_attn."),
        ("", "added_", r"double_blocks.\1.txt_attn."),
        ("single_", "", r"single_blocks.\1."),
    )
    for letter, word in (("q", "query"), ("k", "key"))
]
# Tensors that belong to no layer: norms, tables of modulations, and what is called the same. Patterns of
# diffusers' names -> original names; the first that fits the whole name counts.
SAME = (r"(.+)", r"\1")
NORMS = {
    "sd3": [
        (
            r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.weight",
            r"joint_blocks.\1.x_block.\2.ln_\3.weight",
        ),
        (
            r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight",
            r"joint_blocks.\1.context_block.attn.ln_\2.weight",
        ),
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"context_embedder\.(weight|bias)", r"context_embedder.\1"),
    ],
    "flux": FLUX_NORMS,
    "flux2": FLUX_NORMS,
    "chroma": [
        *FLUX_NORMS,
        (r"distilled_guidance_layer\.norms\.(\d+)\.weight", r"distilled_guidance_layer.norms.\1.scale"),
    ],
    "z-image": [(r"(.+\.attention)\.norm_([qk])\.weight", r"\1.\2_norm.weight"), SAME],
    "krea2": [
        *(
            (rf"{new}\.(\d+)\.{inside}", rf"{old}.\1.{original}")
            for new, old in (
                ("transformer_blocks", "blocks"),
                (r"text_fusion\.layerwise_blocks", "txtfusion.layerwise_blocks"),
                (r"text_fusion\.refiner_blocks", "txtfusion.refiner_blocks"),
            )
            for inside, original in (
                (r"norm1\.weight", "prenorm.scale"),
                (r"norm2\.weight", "postnorm.scale"),
                (r"attn\.norm_q\.weight", "attn.qknorm.qnorm.scale"),
                (r"attn\.norm_k\.weight", "attn.qknorm.knorm.scale"),
                ("scale_shift_table", "mod.lin"),
            )
        ),
        (r"txt_in\.norm\.weight", "txtmlp.0.scale"),
        (r"final_layer\.norm\.weight", "last.norm.scale"),
        (r"final_layer\.scale_shift_table", "last.modulation.lin"),
    ],
    "qwen-image": [SAME],
    "qwen-image-2.1": [SAME],
    "lumina2": [
        (r"(.+\.\d+)\.norm1(?:\.norm)?\.weight", r"\1.attention_norm1.weight"),
        (r"(.+\.\d+)\.norm2\.weight", r"\1.attention_norm2.weight"),
        (r"(.+\.\d+)\.attn\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
        (r"time_caption_embed\.caption_embedder\.0\.weight", "cap_embedder.0.weight"),
        SAME,
    ],
}
