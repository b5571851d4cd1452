"""ComfyUI's own core, if COMFYUI names its folder, and tiny MODELs of its real classes with the weights of diffusers models.

torchvision and torchaudio are not among what afa's tests install: the core imports names from them for models that no test here uses, so empty
modules stand in for them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

import torch
from original_layout import unet_tensors
from original_transformers import originals

COMFYUI = os.environ.get("COMFYUI")
UNET = {"block_out_channels": (32, 64), "norm_num_groups": 32, "layers_per_block": 1, "cross_attention_dim": 24}
SD15 = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,  # diffusers' name for the number of heads
}
SD20 = SD15 | {"attention_head_dim": (4, 8), "use_linear_projection": True}  # diffusers' name for their numbers
HEAD = 8  # width of a head in these two, 64 in their published sizes
SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (4, 8),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 40,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 16,
}
NOT_INSTALLED = [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None]
FLUX = {"in_channels": 64, "pooled_projection_dim": 16, "num_layers": 2, "num_single_layers": 2}

SD3 = {"in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
SD3 |= {"pooled_projection_dim": 40, "dual_attention_layers": (0,)}

CHROMA = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "approximator_num_channels": 64}  # the core knows no other depth


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the packages that are not installed; each name in it is an empty class."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in NOT_INSTALLED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def empty(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty  # type: ignore[method-assign]


def load_core() -> Any:
    """Import what the tests use of the core, on the CPU; its own command line is not read."""
    assert COMFYUI is not None
    if COMFYUI not in sys.path:
        sys.path.insert(0, COMFYUI)
    stand_in = StandIn()
    sys.meta_path.append(stand_in)
    importlib.import_module("comfy.options").args_parsing = False
    importlib.import_module("comfy.cli_args").args.cpu = True
    names = "sample samplers sd model_base model_detection model_management model_patcher supported_models controlnet lora conds hooks"
    for name in (*(f"comfy.{name}" for name in names.split()), "nodes", "execution"):
        importlib.import_module(name)
    sys.meta_path.remove(stand_in)
    for name in [name for name in sys.modules if name.partition(".")[0] in NOT_INSTALLED]:  # other libraries would take them for the real ones
        del sys.modules[name]
    rotary = importlib.import_module("comfy.ldm.flux.math")
    kernel = rotary.apply_rope
    # the kernels of cores after 0.3.64 take no double precision, in which tests compare with diffusers
    rotary.apply_rope = lambda q, k, pe: tuple(rotary._apply_rope1(one, pe) for one in (q, k)) if q.dtype == torch.float64 else kernel(q, k, pe)
    return importlib.import_module("comfy")


def unet_model(core: Any, unet: Any, kind: str = "SD15", dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of a diffusers U-Net. kind: of comfy.supported_models; the settings are detected from the tensors."""
    tensors = unet_tensors(unet)
    settings = core.model_detection.detect_unet_config(tensors, "") | {"dtype": dtype}
    config = getattr(core.supported_models, kind)(settings)
    if config.unet_config["num_head_channels"] != -1:
        config.unet_config["num_head_channels"] = HEAD
    if kind == "SD20":  # the core looks for it in the spread of a layer that tiny models do not have
        config.model_type = lambda *_: core.model_base.ModelType.V_PREDICTION
    return _patcher(core, config, tensors)


def flux_model(core: Any, transformer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of a diffusers FLUX.1 transformer."""
    config = transformer.config
    own = {"vec_in_dim": config.pooled_projection_dim, "in_channels": config.in_channels // 4, "out_channels": config.in_channels // 4}
    settings = _flux_settings(transformer, "flux", dtype) | own | {"guidance_embed": config.guidance_embeds}
    return _patcher(core, core.supported_models.Flux(settings), dict(originals("flux", transformer.state_dict())))


def chroma_model(core: Any, transformer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of a diffusers Chroma transformer."""
    config, tensors = transformer.config, dict(originals("flux", transformer.state_dict()))
    own = {"in_dim": config.approximator_num_channels, "hidden_dim": config.approximator_hidden_dim, "n_layers": config.approximator_layers}
    own |= {"in_channels": config.in_channels, "out_channels": config.in_channels, "out_dim": transformer.inner_dim, "vec_in_dim": None}
    settings = _flux_settings(transformer, "chroma", dtype) | own
    known = importlib.import_module("comfy.ldm.chroma.model").ChromaParams.__dataclass_fields__
    settings = {name: value for name, value in settings.items() if name in known or name in ("image_model", "dtype")}
    for name, tensor in transformer.state_dict().items():
        if name.startswith("distilled_guidance_layer."):
            name = name.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
            tensors[name.replace(".weight", ".scale") if ".norms." in name else name] = tensor
    return _patcher(core, core.supported_models.Chroma(settings), tensors)


def _flux_settings(transformer: Any, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Settings that FLUX.1 and Chroma share. They are given: the core detects no others than those of the published sizes."""
    config = transformer.config
    settings = {
        "image_model": kind,
        "dtype": dtype,
        "patch_size": 2,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": transformer.inner_dim,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": 4.0,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": 10000,
        "qkv_bias": True,
    }
    parameters = importlib.import_module("comfy.ldm.flux.model").FluxParams
    if "txt_ids_dims" in parameters.__dataclass_fields__:  # since FLUX.2, which has some
        settings["txt_ids_dims"] = []
    return settings


def sd3_model(core: Any, transformer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of a diffusers SD 3 transformer."""
    tensors = dict(originals("sd3", transformer.state_dict()))
    settings = core.model_detection.detect_unet_config(tensors, "") | {"dtype": dtype}
    return _patcher(core, core.supported_models.SD3(settings), tensors)


def _patcher(core: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    model = config.get_model(tensors, "")
    tensors = config.process_unet_state_dict(tensors)
    missing, unexpected = model.diffusion_model.load_state_dict(tensors, strict=False)
    assert not missing and not unexpected
    cpu = torch.device("cpu")
    return core.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def sample(core: Any, model: Any, positive: Any, negative: Any, noise: torch.Tensor, steps: int = 3, cfg: float = 5.0, **more: Any) -> torch.Tensor:
    """What the node KSampler calls: euler on the normal schedule."""
    with torch.inference_mode():
        return core.sample.sample(model, noise, steps, cfg, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0, **more)
