"""ComfyUI's Chroma as stages: FLUX.1's blocks, whose modulations one network computes for all of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.comfyui.flux import DoubleBlock, FluxReader, SingleBlock
from afa.comfyui.network import Call, Options, from_its_module
from afa.comfyui.tokens import TokenHead, blocks_of, grid_of
from afa.errors import UserError
from afa.stages.stage import Stage, StageContext
from afa.stages.tokens import LEVEL, TokenContext, as_map, pack

PLACES = (
    344  # rows of the modulation: 3 for each of 38 single, 12 for each of 19 double blocks, 2 for the output
)
WIDTH = 16  # of the sinusoidal embeddings of timestep and guidance; that of the place is twice as wide


@dataclass(kw_only=True, eq=False)
class ModulatedDouble(DoubleBlock):
    """A double block; it takes its part of the modulation. network: computes it"""

    network: Any

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        given, take = context.conditions, self.network.get_modulations
        parts = [take(given["vec"], kind, idx=self.index) for kind in ("double_img", "double_txt")]
        return {**given, "vec": tuple(parts)}


@dataclass(kw_only=True, eq=False)
class ModulatedSingle(SingleBlock):
    """A single block; it takes its part of the modulation. network: computes it"""

    network: Any

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        given = context.conditions
        return {**given, "vec": self.network.get_modulations(given["vec"], "single", idx=self.index)}


@dataclass(kw_only=True, eq=False)
class ModulatedHead(TokenHead):
    """The output norm and projection; the norm takes its part of the modulation."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        part = self.model.get_modulations(context.conditions["vec"], "final")
        patches: Tensor = self.model.final_layer(image, vec=part)
        return patches


class ChromaReader(FluxReader):
    """Reads ComfyUI's `Chroma`."""

    family = "chroma"

    def stages(self, network: Any) -> tuple[Stage, ...]:
        double, single = network.double_blocks, network.single_blocks
        if network.patch_size != 2**LEVEL or 12 * len(double) + 3 * len(single) + 2 != PLACES:
            raise UserError(
                f"a Chroma with patches of {network.patch_size}, {len(double)} double and {len(single)} "
                f"single blocks is not served in ComfyUI; patches of {2**LEVEL}, 19 and 38 are"
            )
        width, more = network.hidden_size, {"network": network}
        return (
            *blocks_of(ModulatedDouble, "D", "double", double, width, total=len(double), **more),
            *blocks_of(ModulatedSingle, "S", "single", single, width, total=len(single), **more),
            ModulatedHead(name="OUT", channels=network.out_channels, level=LEVEL, model=network),
        )

    def widths(self, network: Any) -> tuple[int, int, int]:
        return WIDTH, network.hidden_size, network.txt_in.in_features

    def begin(self, network: Any, call: Call, options: Options) -> tuple[Tensor, StageContext]:
        x, grid = call["x"], grid_of(call["x"])
        embed = from_its_module(network, "timestep_embedding")
        rows, columns = grid
        padded = from_its_module(network, "comfy").ldm.common_dit.pad_to_patch_size(x, (2**LEVEL, 2**LEVEL))
        hidden = network.img_in(pack(padded))
        temb, strength = (embed(call[name], WIDTH).to(hidden) for name in ("timestep", "guidance"))
        places = embed(torch.arange(PLACES, device=x.device), 2 * WIDTH).to(hidden)
        both = torch.cat([temb, strength], dim=1)[:, None].expand(-1, PLACES, -1)
        modulation = torch.cat([both, places.expand(len(both), -1, -1)], dim=-1)
        text = network.txt_in(call["context"])
        ids = x.new_zeros(len(x), text.shape[1] + rows * columns, 3)
        ids[:, text.shape[1] :, 1] = torch.arange(rows).to(ids).repeat_interleave(columns)
        ids[:, text.shape[1] :, 2] = torch.arange(columns).to(ids).repeat(rows)
        conditions = {
            "vec": network.distilled_guidance_layer(modulation),
            "pe": network.pe_embedder(ids),
            "attn_mask": call.get("attention_mask"),
            "transformer_options": options,
        }
        context = TokenContext(temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions)
        return as_map(hidden, grid), context
