"""ComfyUI's FLUX.1 as stages: `double_blocks.i` is D.., `single_blocks.i` S.., `final_layer` OUT.

Blocks note where they are in transformer_options, as the forward does; patches in attention read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afa.comfyui.network import Call, NetworkReader, Options, from_its_module
from afa.comfyui.tokens import TokenHead, blocks_of, grid_of, residuals_of
from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.stages.stage import Stage, StageContext
from afa.stages.tokens import LEVEL, Block, SequenceBlock, TokenContext, as_map

TIME = 256  # width of the sinusoidal embedding of the timestep
LARGEST = 65504  # of float16


@dataclass(kw_only=True, eq=False)
class DoubleBlock(Block):
    """A double block. Its tokens are copied, since ComfyUI's blocks change theirs in place.

    total: number of double blocks
    """

    total: int

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        assert context.text_tokens is not None
        _note(self, context)
        tokens = {"img": image.clone(), "txt": context.text_tokens.clone()}
        image, text = self.module(**tokens, **self.arguments(context))
        return text, image


@dataclass(kw_only=True, eq=False)
class SingleBlock(SequenceBlock):
    """A single block, which takes text and image tokens as one sequence.

    total: number of single blocks
    """

    total: int

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        assert context.text_tokens is not None
        length = context.text_tokens.shape[1]
        _note(self, context, img_slice=[length, length + image.shape[1]])
        if self.index == 0 and image.dtype == torch.float16:  # as ComfyUI does between the kinds of blocks
            image = torch.nan_to_num(image, nan=0.0, posinf=LARGEST, neginf=-LARGEST)
        return super().process(image, context)


class FluxReader(NetworkReader):
    """Reads ComfyUI's `Flux`."""

    family = "flux"

    def stages(self, network: Any) -> tuple[Stage, ...]:
        _check(network)
        double, single, width = network.double_blocks, network.single_blocks, network.hidden_size
        return (
            *blocks_of(DoubleBlock, "D", "double", double, width, total=len(double)),
            *blocks_of(SingleBlock, "S", "single", single, width, total=len(single)),
            TokenHead(name="OUT", channels=network.out_channels, level=LEVEL, model=network),
        )

    def widths(self, network: Any) -> tuple[int, int, int]:
        return network.hidden_size, network.hidden_size, network.txt_in.in_features

    def begin(self, network: Any, call: Call, options: Options) -> tuple[Tensor, StageContext]:
        if call.get("ref_latents") is not None:
            raise UserError(
                "reference images (ReferenceLatent, FLUX.1 Kontext) are not supported by an ensemble; "
                "leave the node out"
            )
        x, settings = call["x"], network.params
        # a later core than 0.3.64 takes the options, in which a node may scale or shift the places
        scaled = {"transformer_options": options} if "rope_options" in options else {}
        patches, places = network.process_img(x, **scaled)
        hidden, embed = network.img_in(patches), from_its_module(network, "timestep_embedding")
        temb = network.time_in(embed(call["timestep"], TIME).to(hidden.dtype))
        if settings.guidance_embed and call.get("guidance") is not None:
            temb = temb + network.guidance_in(embed(call["guidance"], TIME).to(hidden.dtype))
        pooled = call.get("y")
        if pooled is None:
            pooled = hidden.new_zeros(len(hidden), settings.vec_in_dim)
        temb = temb + network.vector_in(pooled[:, : settings.vec_in_dim])
        text = network.txt_in(call["context"])
        text_places = places.new_zeros(len(text), text.shape[1], places.shape[-1])
        conditions = {
            "vec": temb,
            "pe": network.pe_embedder(torch.cat([text_places, places], dim=1)),
            "attn_mask": call.get("attention_mask"),
            "transformer_options": options,
        }
        grid = grid_of(x)
        context = TokenContext(temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions)
        return as_map(hidden, grid), context

    def control(self, stages: Sequence[Stage], call: Call) -> PassOptions:
        control, grid, residuals = call.get("control") or {}, grid_of(call["x"]), {}
        for group, name in (("double", "input"), ("single", "output")):
            blocks = [stage for stage in stages if stage.group == group]
            residuals |= residuals_of(blocks, control.get(name) or (), grid)
        return PassOptions(residuals=residuals)

    def end(self, prediction: Tensor, call: Call) -> Tensor:
        height, width = call["x"].shape[-2:]
        # a patch's features are ordered by channel, row, column; what was padded is cut off
        return nn.functional.pixel_shuffle(prediction, 2**LEVEL)[:, :, :height, :width]


def _note(block: DoubleBlock | SingleBlock, context: TokenContext, **more: Any) -> None:
    """Note in transformer_options which block runs."""
    noted = {"block_type": block.group, "block_index": block.index, "total_blocks": block.total}
    context.conditions["transformer_options"] |= noted | more


def _check(network: Any) -> None:
    """Raise UserError for a Flux of another kind than FLUX.1, which its forward computes differently."""
    settings = network.params
    others = ("global_modulation", "txt_norm", "yak_mlp", "txt_ids_dims")  # not in 0.3.64
    given = [name for name in others if getattr(settings, name, None)]
    if given or network.patch_size != 2**LEVEL or settings.vec_in_dim is None:
        raise UserError(
            f"a Flux with patches of {network.patch_size}, pooled text of width {settings.vec_in_dim} and "
            f"{', '.join(given) or 'nothing else'} (FLUX.2, LongCat-Image, Ovis-Image …) is not served in "
            "ComfyUI; FLUX.1 is"
        )
