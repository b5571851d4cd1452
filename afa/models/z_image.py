"""The Z-Image family: stages, call, drop-in denoiser.

`ZImageTransformer2DModel` is read as stages N00, N01 (the noise refiner: image tokens only), Z00 … Z29 (image
and caption tokens as one sequence) and OUT. The context refiner, which sees captions only, belongs to the
embedding. Every expert keeps its own caption tokens. Only the model's own sub-modules run.

Image tokens, and each caption, are padded with learnt tokens to a multiple of 32. Padding of the image takes
part in all blocks but stands for no place, so aggregators do not see it: it travels with the caption tokens.

The stock model takes lists, with one entry for each image; its timestep rises from 0 (noise) to 1 (image),
and it predicts image minus noise. The stage OUT predicts noise minus image, as schedulers of flows expect.

Source of the architecture: Z-Image team, arXiv:2511.22699.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from afa.denoiser.forward import PassOptions
from afa.models.transformer import BlockList, RisingInterface, UnpackedEnsemble, refuse_attention_options
from afa.stages.stage import Stage, base_layer
from afa.stages.tokens import (
    LEVEL,
    Head,
    RefinedContext,
    RefinerBlock,
    SequenceBlock,
    TokenContext,
    as_map,
    mask_of,
    sequence_of,
    set_steps,
)

PATCHES = "2-1"  # key of the embedding and of the output head for patches of 2×2 latent pixels of one frame
# parts of the transformer that a ControlNet of the stock pipelines runs, too
CONTROLNET_PARTS = (
    "t_scale",
    "t_embedder",
    "all_x_embedder",
    "cap_embedder",
    "rope_embedder",
    "noise_refiner",
    "context_refiner",
    "x_pad_token",
    "cap_pad_token",
)


@dataclass(kw_only=True)
class ZImageContext(RefinedContext):
    """The context of a Z-Image expert; its `text_tokens` are padding of the image, then caption tokens.

    controls: stage name -> (B, P + T, C), what a ControlNet adds to `text_tokens` after that stage
    """

    controls: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class ZImageLayer(SequenceBlock):
    """One block of the whole sequence: image tokens, their padding, caption tokens."""

    text_first = False

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        assert isinstance(context, ZImageContext)
        text, image = super().process(image, context)
        assert text is not None
        return text + context.controls[self.name] if self.name in context.controls else text, image


@dataclass(kw_only=True, eq=False)
class ZImageHead(Head):
    """The final layer, of the whole sequence as in the stock forward. It predicts noise minus image."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        assert context.text_tokens is not None
        sequence = sequence_of(context.text_tokens, image, text_first=False)
        patches: Tensor = self.final_layer(sequence, c=context.temb)
        return -patches[:, : image.shape[1]]

    @property
    def final_layer(self) -> Any:
        return self.model.all_final_layer[PATCHES]

    def modules(self) -> list[object]:
        return [self.final_layer]


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    cap_feats: Sequence[Tensor],
    controls: Mapping[str, Tensor],
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, ZImageContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:    (B, C, H, W) noisy latents
    timestep:  (B,) from 0 (noise) to 1 (image)
    cap_feats: B captions, (T, D) states of Qwen3 each
    controls:  stage name -> (B, S + P + T, C) residuals of a ControlNet
    Returns the image tokens as a map, and the context.
    """
    device = sample.device
    temb = model.t_embedder(timestep * model.t_scale).type_as(sample)
    images, captions, _, *ids, image_pads, caption_pads = model.patchify_and_embed(
        list(sample[:, :, None]), list(cap_feats), 2**LEVEL, 1
    )

    def sequence(layer: nn.Module, parts: list[Tensor], ids: Any, pads: Any, pad_token: Tensor) -> Any:
        lengths = [len(part) for part in parts]
        features = list(layer(torch.cat(parts)).split(lengths))
        return model._prepare_sequence(features, ids, pads, pad_token, None, device)[:4]

    embedder = model.all_x_embedder[PATCHES]
    image, image_freqs, image_mask, image_lengths = sequence(
        embedder, images, ids[0], image_pads, model.x_pad_token
    )
    text, text_freqs, mask, text_lengths = sequence(
        model.cap_embedder, captions, ids[1], caption_pads, model.cap_pad_token
    )
    for layer in model.context_refiner:
        text = layer(text, mask, text_freqs)
    whole, freqs, mask, _ = model._build_unified_sequence(
        *(image, image_freqs, image_lengths, None),
        *(text, text_freqs, text_lengths, None),
        *(None, None, None, None),
        omni_mode=False,
        device=device,
    )
    grid = sample.shape[-2] // 2**LEVEL, sample.shape[-1] // 2**LEVEL
    pixels = grid[0] * grid[1]
    return as_map(image[:, :pixels], grid), ZImageContext(
        temb=temb,
        text=text,
        text_mask=mask_of([len(caption) for caption in cap_feats], text),
        text_tokens=whole[:, pixels:],
        grid=grid,
        conditions={"attn_mask": mask, "freqs_cis": freqs, "adaln_input": temb},
        refining={"attn_mask": image_mask, "freqs_cis": image_freqs, "adaln_input": temb},
        padding=image.shape[1] - pixels,
        controls={name: control[:, pixels:] for name, control in controls.items()},
    )


def latents_of(images: Sequence[Any]) -> Tensor:
    """Return the latents of a call, (B, C, H, W). images: B × (C, 1, H, W), as the stock forward takes them.

    Raises NotImplementedError for input images (omni), films, and images of different sizes.
    """
    if any(isinstance(image, list) for image in images):
        raise NotImplementedError(
            "images beside the one that is drawn (omni, editing) are not supported by an ensemble; "
            "leave them out"
        )
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        raise NotImplementedError(
            f"images of different sizes in one batch {sizes} are not supported by an ensemble; "
            "draw them one size at a time"
        )
    if sizes[0][1] != 1:
        raise NotImplementedError(f"x has {sizes[0][1]} frames; an ensemble draws images, of one frame each")
    return torch.stack(list(images))[:, :, 0]


class ZImageInterface(RisingInterface):
    """How Z-Image is called: a list of latents, timesteps from 0 to 1 that rise, a list of captions' states.

    Its pipelines count guidance from 0: their guidance_scale 3 is a strength of 4 here, as everywhere else
    (without prompt + strength · difference), and strength 1, their 0, is none, as Turbo models need it.
    """

    pipeline_class = "ZImagePipeline"
    latents_input = "x"
    timestep_input = "t"
    text_inputs: ClassVar[Mapping[str, str]] = {"cap_feats": "cap_feat_dim"}
    max_sequence_length = 512  # at most; each caption is as long as it is
    prompt_outputs = (0,)
    prompt_names = ("prompt_embeds", "negative_prompt_embeds")
    variable_length = True
    prompt_first = True
    guidance_from_zero = True
    guidance_scale = 6.0  # the pipelines' 5; no config tells Turbo, which needs 1, from the base model
    shared_config_keys = ("in_channels", "cap_feat_dim", "axes_dims", "n_heads", "rope_theta", "t_scale")
    concat_text = False  # experts share the encoder of 4 billion parameters, which fine-tunes do not change

    def sample_size(self, config: Any) -> Any:
        return 128  # of latents of 1024 px, the default of the stock pipelines; no config records it

    def select_prompt_outputs(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return states, padded with zeros to the longest caption, and a mask."""
        states = pad_sequence(list(encoded[0]), batch_first=True)
        mask = mask_of([len(caption) for caption in encoded[0]], states)
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return states, everything if mask is None else mask

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        states, mask = parts
        return {"cap_feats": [caption[kept] for caption, kept in zip(states, mask.bool(), strict=True)]}

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        return {"cap_feats": list(empty(batch, tokens, config.cap_feat_dim))}

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        return {"x": list(noisy[:, :, None]), "t": self.timestep_to_model(times.float()), **conditions}

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        return latents_of(call["x"])

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.patch**2, single=True)

    def to_latents(self, output: Any, size: tuple[int, int]) -> Tensor:
        return super().to_latents(torch.stack(list(output))[:, :, 0], size)

    def from_latents(self, prediction: Tensor) -> Any:
        return list(super().from_latents(prediction)[:, :, None])


class ZImageEnsemble(UnpackedEnsemble):
    """N `ZImageTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "z-image"
    interface = ZImageInterface()
    block_lists = (
        BlockList("noise_refiner", "N", "refiner", RefinerBlock, ("feed_forward",)),
        BlockList("layers", "Z", "layer", ZImageLayer, ("feed_forward",)),
    )
    # 32 blocks, 3840 channels: aggregators of three experts (sabw) have 144 million parameters at all stages,
    # and 38 million at every fourth
    default_placement = "every-4"

    @classmethod
    def read_stages(cls, model: Any, /) -> tuple[Stage, ...]:
        """Read a model as stages. Raises ValueError, naming the setting, for unsupported variants."""
        sizes = [
            f"{side}-{frames}"
            for side, frames in zip(model.config.all_patch_size, model.config.all_f_patch_size, strict=True)
        ]
        if sizes != [PATCHES]:
            raise ValueError(
                f"all_patch_size {list(model.config.all_patch_size)} with all_f_patch_size "
                f"{list(model.config.all_f_patch_size)} is not supported; only [2] with [1] is"
            )
        if model.config.get("siglip_feat_dim") is not None:
            raise ValueError(
                "siglip_feat_dim (the omni variant, for editing) is not supported; "
                "only Z-Image itself is, which draws images from text"
            )
        return super().read_stages(model)

    @classmethod
    def hidden_size(cls, model: Any) -> int:
        return int(model.config.dim)

    @classmethod
    def read_head(cls, model: Any) -> Head:
        channels = base_layer(model.all_final_layer[PATCHES].linear).out_features
        return ZImageHead(name="OUT", channels=channels, level=LEVEL, model=model)

    @property
    def widths(self) -> tuple[int, int]:
        first: Any = self.experts[0]
        return base_layer(first.t_embedder.mlp[-1]).out_features, self.hidden_size(first)

    @property
    def in_channels(self) -> int:
        """The number of channels of the latents; the pipelines read it here."""
        return int(self.config.in_channels)

    def __getattr__(self, name: str) -> Any:
        """Return the first expert's part for a ControlNet, which was trained with one model."""
        if name in CONTROLNET_PARTS:
            return getattr(self.experts[0], name)
        return super().__getattr__(name)

    def first_expert_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs  # all experts share one text

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        controlnet_block_samples: Mapping[int, Tensor] | None = None,
        siglip_feats: Sequence[Any] | None = None,
        image_noise_mask: Sequence[Any] | None = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[list[Tensor]]:
        """Predict like the stock forward, with the same arguments.

        x:         B × (C, 1, H, W), all of one size
        cap_feats: B × (T, D), the same for all experts
        Raises NotImplementedError for inputs of the omni variant (siglip_feats, image_noise_mask, several
        images), for other patches than 2×2, and for attention options other than the LoRA's scale.
        """
        for name, given in (("siglip_feats", siglip_feats), ("image_noise_mask", image_noise_mask)):
            if given is not None:
                raise NotImplementedError(
                    f"{name} (omni, editing) is not supported by an ensemble of Z-Image experts; leave it out"
                )
        if f"{patch_size}-{f_patch_size}" != PATCHES:
            raise NotImplementedError(
                f"patch_size {patch_size} with f_patch_size {f_patch_size} is not supported; only 2 with 1 is"
            )
        refuse_attention_options(joint_attention_kwargs, "Z-Image")
        sample, width = latents_of(x), self.config.cap_feat_dim
        if len(cap_feats) != len(x) or any(caption.shape[1:] != (width,) for caption in cap_feats):
            shapes = [tuple(caption.shape) for caption in cap_feats]
            raise ValueError(f"cap_feats are {shapes}; expected {len(x)} captions of shape (T, {width})")
        grid = sample.shape[-2] // 2**LEVEL, sample.shape[-1] // 2**LEVEL
        layers = [stage.name for stage in self.stages if stage.group == "layer"]
        controls = {layers[index]: control for index, control in (controlnet_block_samples or {}).items()}
        residuals = {name: as_map(part[:, : grid[0] * grid[1]], grid) for name, part in controls.items()}
        return self._predict(
            partial(embed, cap_feats=cap_feats, controls=controls),
            sample,
            t,
            [{}] * len(self.experts),
            cap_feats[0],
            PassOptions(residuals=residuals),
            joint_attention_kwargs,
            return_dict,
        )
