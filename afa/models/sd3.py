"""The SD3 family (Stable Diffusion 3 and 3.5): stages, call, drop-in denoiser.

`SD3Transformer2DModel` is read as stages J00 … and OUT. Its joint blocks change image and text tokens
together; those of 3.5-medium attend to the image twice. Every expert keeps its own text tokens. Only the
model's own sub-modules run.

Source of the architecture: Esser et al., arXiv:2403.03206, section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, attention_options, first_parts, split_joined
from afa.denoiser.forward import Residuals
from afa.denoiser.lora import lora_scaled
from afa.models import sd3
from afa.stages.call import Call
from afa.stages.stage import Stage
from afa.stages.tokens import LEVEL, Block, Head, TokenTrace, as_map


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `SD3Transformer2DModel` as stages: the blocks (SD3 and 3.5-medium: 24, 3.5-large: 38), the head.

    Raises ValueError for a patch size other than 2.
    """
    if model.config.patch_size != 2**LEVEL:
        raise ValueError(f"patch_size {model.config.patch_size} is not supported; only {2**LEVEL} is")
    blocks = [
        Block(
            name=f"J{index:02}",
            channels=model.inner_dim,
            level=LEVEL,
            block=f"transformer_blocks.{index}",
            module=block,
            # the attention output of the last block's text tokens is dropped
            silent=("attn.add_q_proj",) if block.context_pre_only else (),
        )
        for index, block in enumerate(model.transformer_blocks)
    ]
    return (*blocks, Head(name="OUT", channels=model.proj_out.out_features, level=LEVEL, model=model))


def widths(model: Any) -> tuple[int, int]:
    """Return the widths of the time embedding (E) and of the text states (D)."""
    return model.inner_dim, model.context_embedder.out_features


def begin(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    pooled: Tensor,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenTrace]:
    """Start the pass of one expert.

    sample:   (B, C, H, W) noisy latents
    timestep: (B,)
    text:     (B, T, D) states of all text encoders
    pooled:   (B, P) pooled states of CLIP
    options:  of the attention processors
    Returns the image tokens as a map, and the trace.
    """
    grid = (sample.shape[-2] // 2**LEVEL, sample.shape[-1] // 2**LEVEL)
    hidden = model.pos_embed(sample)
    temb = model.time_text_embed(timestep, pooled)
    states = model.context_embedder(text)
    conditions = {"temb": temb, "joint_attention_kwargs": options}
    return as_map(hidden, grid), TokenTrace(
        temb=temb, text=states, stream=states, grid=grid, conditions=conditions
    )


def unfold(patches: Tensor) -> Tensor:
    """Arrange the head's patches as latents: (B, p·p·C, H, W), ordered p, p, C -> (B, C, p·H, p·W)."""
    side = 2**LEVEL
    batch, channels, height, width = patches.shape
    parts = patches.view(batch, side, side, channels // side**2, height, width)
    return torch.einsum("npqchw->nchpwq", parts).reshape(
        batch, channels // side**2, side * height, side * width
    )


def fold(latents: Tensor) -> Tensor:
    """Undo `unfold`: latents to patches in the head's order, (B, C, p·H, p·W) -> (B, p·p·C, H, W)."""
    side = 2**LEVEL
    parts = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, H, p, W, p)
    return torch.einsum("nchpwq->npqchw", parts).flatten(1, 3)


def without_text(model: Any) -> list[str]:
    """Return the names of the blocks that drop the text tokens: the last one. ControlNets skip it."""
    return [f"J{index:02}" for index, block in enumerate(model.transformer_blocks) if block.context_pre_only]


class SD3Call(Call):
    """How SD3 is called: unpacked latents, the states of all text encoders, and pooled states."""

    tokens = 77 + 256  # of CLIP, then of T5
    patch = 2**LEVEL
    encoded = (0, 2)
    guidance = 7.0
    read = (0, 2)  # both CLIP encoders read the same tokens
    joined = False  # the stock pipelines pad CLIP's states to T5's width, which would cut joined ones
    alike = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "qk_norm",
        "dual_attention_layers",
    )

    def pipeline(self, text_encoders: int) -> str:
        return "StableDiffusion3Pipeline"

    def side(self, config: Any) -> Any:
        return config.sample_size

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "pooled_projections": parts[1]}

    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        parts = [empty(batch, tokens, config.joint_attention_dim), empty(batch, config.pooled_projection_dim)]
        return self.conditions(config, parts, empty())

    def arguments(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": times, **conditions}

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        return call["hidden_states"]


class SD3Ensemble(EnsembleDenoiser):
    """N `SD3Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "sd3"
    call = SD3Call()
    read_stages = staticmethod(stages)

    @property
    def widths(self) -> tuple[int, int]:
        return sd3.widths(self.experts[0])

    def first_expert_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        widths = {
            "encoder_hidden_states": self.config.joint_attention_dim,
            "pooled_projections": self.config.pooled_projection_dim,
        }
        return args, first_parts(kwargs, widths, len(self.experts))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        pooled_projections:    (B, P) or (B, N·P), in the same way
        Raises NotImplementedError for IP-Adapter.
        """
        options, lora_scale = attention_options(joint_attention_kwargs)
        count, config = len(self.experts), self.config
        texts = split_joined(
            encoder_hidden_states, (config.joint_attention_dim,), count, "encoder_hidden_states"
        )
        pooled = split_joined(
            pooled_projections, (config.pooled_projection_dim,), count, "pooled_projections"
        )

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            return sd3.begin(
                self.experts[expert],
                *self.inputs_for_expert(expert, hidden_states, timestep),
                texts[expert],
                pooled[expert],
                options,
            )

        grid = (hidden_states.shape[-2] // sd3.SD3Call.patch, hidden_states.shape[-1] // sd3.SD3Call.patch)
        residuals = self._residuals(block_controlnet_hidden_states, grid)
        skipped = [self.stages[index].name for index in skip_layers or ()]
        with lora_scaled(self.experts, lora_scale):
            prediction = sd3.unfold(
                self._run(begin, timestep, residuals, skipped=skipped, noisy=lambda: sd3.fold(hidden_states))
            )
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _residuals(self, controls: Sequence[Tensor] | None, grid: tuple[int, int]) -> Residuals:
        """Assign ControlNet residuals (B, S, C) to blocks: each serves several blocks in a row.

        Blocks that drop the text tokens get none.
        """
        residuals = Residuals()
        if controls:
            blocks, without = self.stages[:-1], sd3.without_text(self.experts[0])
            for index, stage in enumerate(blocks):
                if stage.name not in without:
                    residuals.to_hidden[stage.name] = as_map(
                        controls[int(index / (len(blocks) / len(controls)))], grid
                    )
        return residuals
