"""ComfyUI's Stable Diffusion 3 and 3.5 as stages: `joint_blocks.i` is J.., `final_layer` OUT."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa.comfyui.network import Call, NetworkReader, Options
from afa.comfyui.tokens import TokenHead, blocks_of, grid_of, residuals_of
from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.stages.stage import Stage, StageContext
from afa.stages.tokens import LEVEL, Block, TokenContext, as_map, unfold


@dataclass(kw_only=True, eq=False)
class JointBlock(Block):
    """A joint block; the last one returns no text tokens."""

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        text, image = self.module(context.text_tokens, image, **self.arguments(context))
        return text, image


class SD3Reader(NetworkReader):
    """Reads ComfyUI's `OpenAISignatureMMDITWrapper`, around whose forward no wrapper runs."""

    family = "sd3"
    wrapped = False

    def stages(self, network: Any) -> tuple[Stage, ...]:
        side, registers = network.patch_size, network.register_length
        if (
            side != 2**LEVEL
            or registers
            or network.context_processor is not None
            or network.y_embedder is None
        ):
            raise UserError(
                f"an MMDiT with patches of {side}, {registers} registers, or other parts before its blocks "
                "than Stable Diffusion 3 and 3.5 is not served in ComfyUI"
            )
        channels = network.final_layer.linear.out_features
        head = TokenHead(name="OUT", channels=channels, level=LEVEL, model=network)
        return *blocks_of(JointBlock, "J", "joint", network.joint_blocks, network.hidden_size), head

    def widths(self, network: Any) -> tuple[int, int, int]:
        return network.hidden_size, network.hidden_size, network.context_embedder.in_features

    def begin(self, network: Any, call: Call, options: Options) -> tuple[Tensor, StageContext]:
        x, grid = call["x"], grid_of(call["x"])
        hidden = network.x_embedder(x)
        hidden = hidden + network.cropped_pos_embed(x.shape[-2:], device=x.device).to(hidden)
        temb = network.t_embedder(call["timesteps"], dtype=hidden.dtype)
        if call.get("y") is not None:
            temb = temb + network.y_embedder(call["y"])
        text = network.context_embedder(call["context"])
        conditions = {"c": temb, "use_checkpoint": False, "transformer_options": options}
        context = TokenContext(temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions)
        return as_map(hidden, grid), context

    def control(self, stages: Sequence[Stage], call: Call) -> PassOptions:
        given = (call.get("control") or {}).get("output") or ()
        blocks = [stage for stage in stages if stage.group == "joint"]
        return PassOptions(residuals=residuals_of(blocks, given, grid_of(call["x"])))

    def end(self, prediction: Tensor, call: Call) -> Tensor:
        height, width = call["x"].shape[-2:]
        return unfold(prediction)[:, :, :height, :width]
