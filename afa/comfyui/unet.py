"""ComfyUI's U-Net (Stable Diffusion 1.x, 2.x, SDXL) as stages.

`input_blocks.i` is IN.., `middle_block` M00, `output_blocks.i` OUT..; the last one includes the output head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from afa.comfyui.network import Call, NetworkReader, Options, from_its_module
from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.stages.stage import Stage, StageContext

LAYERS = ("Conv2d", "ResBlock", "SpatialTransformer", "Downsample", "Upsample")


@dataclass(kw_only=True)
class ComfyUNetContext(StageContext):
    """The context of ComfyUI's U-Net.

    options: its transformer_options, in which blocks note where they are
    dtype:   of the latents, in which the output head computes
    """

    options: Options
    dtype: torch.dtype


@dataclass(kw_only=True, eq=False)
class UNetBlock(Stage):
    """One entry of the U-Net's lists of blocks, looked up at each run, since a patch may replace it.

    network: the U-Net
    place:   its list, or "middle", and its number, as ComfyUI's patches know it
    last:    the output head follows
    """

    network: Any
    place: tuple[str, int]
    last: bool = False

    @property
    def module(self) -> nn.Module:
        kind, index = self.place
        found: nn.Module = (
            self.network.middle_block if kind == "middle" else getattr(self.network, f"{kind}_blocks")[index]
        )
        return found

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        assert isinstance(context, ComfyUNetContext)
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=1)
        context.options["block"] = self.place
        shape = None if size is None else (*hidden.shape[:2], *size)  # an upsampler reads its last two
        hidden = self.module(hidden, context.temb, context.text, context.options, shape)
        if self.last:
            hidden = self.network.out(hidden.type(context.dtype))
        return hidden, context

    def modules(self) -> list[object]:
        return [self.module, self.network.out] if self.last else [self.module]


class UNetReader(NetworkReader):
    """Reads ComfyUI's `UNetModel`."""

    family = "unet"

    def stages(self, network: Any) -> tuple[Stage, ...]:
        _check(network)
        levels = list(
            accumulate(any(_is(part, "Downsample") for part in block) for block in network.input_blocks)
        )
        stages = [
            self._stage(network, f"IN{index:02}", ("input", index), level, saves_skip=True)
            for index, level in enumerate(levels)
        ]
        if network.middle_block is not None:
            stages.append(self._stage(network, "M00", ("middle", 0), levels[-1]))
        level = levels[-1]
        for index, block in enumerate(network.output_blocks):
            upsamples = any(_is(part, "Upsample") for part in block)
            level -= upsamples
            facts: dict[str, Any] = {"takes_skip": True, "upsamples": upsamples}
            stages.append(self._stage(network, f"OUT{index:02}", ("output", index), level, **facts))
        stages[-1].last, stages[-1].channels = True, network.out[-1].out_channels
        return tuple(stages)

    def _stage(self, network: Any, name: str, place: tuple[str, int], level: int, **facts: Any) -> UNetBlock:
        stage = UNetBlock(name=name, channels=0, level=level, network=network, place=place, **facts)
        widths = (getattr(part, "out_channels", None) for part in stage.module.children())
        stage.channels = [width for width in widths if width][-1]  # attention keeps the width, and has none
        return stage

    def widths(self, network: Any) -> tuple[int, int, int]:
        readers = (getattr(module, "attn2", None) for module in network.modules())
        text = next((reader.to_k.in_features for reader in readers if reader is not None), 0)
        return network.time_embed[-1].out_features, text, text

    def begin(self, network: Any, call: Call, options: Options) -> tuple[Tensor, StageContext]:
        x, text, label = call["x"], call["context"], call.get("y")
        if (label is None) != (network.num_classes is None):
            raise UserError(
                "this U-Net needs pooled text (SDXL); encode the prompt with the CLIP of its checkpoint"
                if label is None
                else "this U-Net takes no pooled text; encode the prompt with the CLIP of its checkpoint"
            )
        options |= {"original_shape": list(x.shape), "transformer_index": 0}
        embed = from_its_module(network, "timestep_embedding")
        temb = network.time_embed(
            embed(call["timesteps"], network.model_channels, repeat_only=False).to(x.dtype)
        )
        if label is not None:
            temb = temb + network.label_emb(label)
        return x, ComfyUNetContext(temb=temb, text=text, options=options, dtype=x.dtype)

    def control(self, stages: Sequence[Stage], call: Call) -> PassOptions:
        control = call.get("control") or {}
        into = [stage for stage in stages if stage.saves_skip]
        middle = [stage for stage in stages if not (stage.saves_skip or stage.takes_skip)]
        # ComfyUI's lists end with what the first block gets; an output block's residual is for its skip
        size = call["x"].shape[-2:]
        residuals = _assigned(into, control.get("input"), size) | _assigned(
            middle, control.get("middle"), size
        )
        return PassOptions(
            residuals=residuals,
            skip_residuals=_assigned(into[::-1], control.get("output"), size),
            odd_size=True,  # upsamplers always make the size of the next skip, as in ComfyUI
        )

    def end(self, prediction: Tensor, call: Call) -> Tensor:
        return prediction


def _assigned(
    stages: Sequence[Stage], given: Sequence[Tensor | None] | None, size: Sequence[int]
) -> dict[str, Tensor]:
    """Assign a ControlNet's list, which is used up from its end, to stages. size: of the latents"""
    given = list(given or ())[::-1]
    if len(given) > len(stages):
        raise UserError(
            f"the ControlNet gives {len(given)} residuals for {len(stages)} blocks of the experts; "
            "take one of their architecture"
        )
    found = {stage.name: own for stage, own in zip(stages, given, strict=False) if own is not None}
    for stage in stages:
        expected = (stage.channels, *(-(-side // 2**stage.level) for side in size))
        if stage.name in found and found[stage.name].shape[1:] != expected:
            raise UserError(
                f"the ControlNet gives {list(found[stage.name].shape[1:])} for {stage.name}, the experts "
                f"have {list(expected)}; take one of their architecture"
            )
    return found


def _is(module: object, name: str) -> bool:
    return type(module).__name__ == name


def _check(network: Any) -> None:
    """Raise UserError, naming the part, for a U-Net that stages would compute differently."""
    if getattr(network, "predict_codebook_ids", False):
        raise UserError("a U-Net that predicts codebook ids is not served in ComfyUI")
    blocks = [*network.input_blocks, *network.output_blocks, network.middle_block]
    for part in (part for block in blocks if block is not None for part in block):
        kind = type(part).__name__
        if kind not in LAYERS:
            raise UserError(f"a U-Net with a {kind} (video, or a patched one) is not served in ComfyUI")
