"""The drop-in text encoder of an ensemble, and textual inversions for it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers.utils import ModelOutput

from afa.denoiser.lora import LoraHost, applied
from afa.errors import UserError
from afa.experts.headers import first_not_finite, load_tensors


class EnsembleTextEncoder(LoraHost, ModelMixin):
    """N text encoders as one: their states (B, T, D) are concatenated on the last axis to (B, T, N·D).

    encoders: one for each expert, in order; equal ones are kept in memory, and run, once
    joined:   False: the width stays D, for encoders that are all equal; None: joined if they differ
    Raises ValueError for different encoders that are not joined.
    """

    def __init__(self, encoders: Sequence[nn.Module], joined: bool | None = None) -> None:
        super().__init__()
        unique: list[nn.Module] = []
        self.of_expert: list[int] = []  # index of each expert's encoder among the unique ones
        for encoder in encoders:
            same = [index for index, other in enumerate(unique) if same_weights(encoder, other)]
            self.of_expert.append(same[0] if same else len(unique))
            if not same:
                unique.append(encoder)
        self.encoders = nn.ModuleList(unique).requires_grad_(False).eval()
        self.joined = len(unique) > 1 if joined is None else joined
        if len(unique) > 1 and not self.joined:
            raise ValueError(f"{len(unique)} different text encoders must be joined")

    def lora_models(self) -> Sequence[Any]:
        """The encoders, each of which gets the LoRAs that are loaded."""
        return list(self.encoders)

    def replace(self, changed: Mapping[int, nn.Module]) -> None:
        """Give experts, by index, other encoders; experts that shared one still do if all of them change."""
        places: dict[int, int] = {}  # place of an encoder -> place of the one that replaces it
        for index, encoder in changed.items():
            before = self.of_expert[index]
            if before not in places:
                alone = all(other in changed for other, place in enumerate(self.of_expert) if place == before)
                places[before] = before if alone else len(self.encoders)
                if alone:
                    self.encoders[before] = encoder
                else:
                    self.encoders.append(encoder)
        for index in changed:
            self.of_expert[index] = places[self.of_expert[index]]
        self.joined = self.joined or len(self.encoders) > 1

    @property
    def config(self) -> Any:
        """The first encoder's; its widths are those of one expert."""
        return self.encoders[0].config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoders[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.encoders[0].parameters()).device

    @property
    def model(self) -> Any:
        """The inner model of encoders that are all equal; Qwen-Image 2.1 reads its last norm."""
        return self.encoders[0].model

    @property
    def text_model(self) -> "_TextModel":
        """The final layer norms, where `clip_skip` of stock pipelines looks for them."""
        return _TextModel(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> ModelOutput | tuple:
        """The stock forward; every tensor of the output is joined over the experts on its last axis.

        position_ids: for encoders that take them; None: their own
        """
        options: dict[str, Any] = {
            "attention_mask": attention_mask,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
            **({} if use_cache is None else {"use_cache": use_cache}),  # of language models
        }
        if position_ids is not None:
            options["position_ids"] = position_ids
        outputs = [encoder(input_ids, **options) for encoder in self.encoders]
        if self.joined:
            values = {name: self._join([output[name] for output in outputs]) for name in outputs[0]}
            joined = type(outputs[0])(**values)
        else:
            joined = outputs[0]
        return joined.to_tuple() if return_dict is False else joined

    def _join(self, values: list[Any]) -> Any:
        if isinstance(values[0], tuple):  # hidden states: one tensor a layer
            return tuple(self._join(list(layer)) for layer in zip(*values, strict=True))
        return torch.cat([values[index] for index in self.of_expert], dim=-1)

    def final_layer_norm(self, states: Tensor) -> Tensor:
        """Each expert's own final layer norm on its own part: (B, T, D or N·D) -> the same shape."""
        if not self.joined:
            return _final_layer_norm(self.encoders[0])(states)
        parts = states.chunk(len(self.of_expert), dim=-1)
        normed = [
            _final_layer_norm(self.encoders[index])(part)
            for index, part in zip(self.of_expert, parts, strict=True)
        ]
        return torch.cat(normed, dim=-1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast; weights that encoders share (with LoRAs of their own beside them) stay shared."""
        apply: Callable[..., Any] = super()._apply
        return applied(self, lambda: apply(fn, recurse))

    def train(self, mode: bool = True) -> "EnsembleTextEncoder":
        """Frozen: it has no training mode."""
        return super().train(False)

    def get_input_embeddings(self) -> nn.Module:
        """Refused: several encoders have vectors of their own."""
        raise NotImplementedError(
            "words (textual inversion) are loaded into an ensemble by a pipeline of ensemble.pipeline(), "
            "not by one of your own"
        )


class _TextModel:
    """Stands where transformers < 5.6 keeps a CLIP encoder's inner model."""

    def __init__(self, encoder: EnsembleTextEncoder) -> None:
        self.final_layer_norm: Callable[[Tensor], Tensor] = encoder.final_layer_norm


def join_text_encoders(slots: Sequence[Sequence[nn.Module]]) -> list[EnsembleTextEncoder]:
    """One drop-in for each text encoder of the pipeline (SDXL has two).

    slots: by text encoder of the pipeline, the encoders of all experts
    Either all are joined or none, so that a denoiser can tell from the width alone.
    """
    single = [EnsembleTextEncoder(encoders) for encoders in slots]
    if any(encoder.joined for encoder in single):
        for encoder in single:
            encoder.joined = True
    return single


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two text encoders compute the same, bit for bit. Stops at the first difference."""
    if one is other:
        return True
    if type(one) is not type(other) or arithmetic(one) != arithmetic(other):
        return False
    mine, theirs = one.state_dict(), other.state_dict()
    if mine.keys() != theirs.keys():
        return False
    return all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def arithmetic(encoder: nn.Module) -> list[Any]:
    """The settings that change what the same weights compute, strengths of LoRAs among them."""
    names = (
        "hidden_act",
        "layer_norm_eps",
        "rms_norm_eps",
        "num_attention_heads",
        "eos_token_id",
        "projection_dim",
        "rope_parameters",
    )
    return [*(getattr(encoder.config.get_text_config(), name, None) for name in names), *_strengths(encoder)]


def width_of(encoder: Any) -> int:
    """The width D of a text encoder's states; of a model of text and images, that of its text part."""
    return int(encoder.config.get_text_config().hidden_size)


def _strengths(encoder: nn.Module) -> list[tuple[Any, ...]]:
    """The state of each LoRA layer, in order: active adapters, strengths, whether merged or disabled."""
    layers: list[Any] = [
        layer
        for layer in encoder.modules()
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling")
    ]
    return [
        (tuple(layer.active_adapters), dict(layer.scaling), layer.merged, layer.disable_adapters)
        for layer in layers
    ]


def _final_layer_norm(encoder: nn.Module) -> nn.Module:
    inner = getattr(encoder, "text_model", encoder)  # transformers >= 5.6 has no inner model on CLIPTextModel
    return inner.final_layer_norm


def load_inversion(
    pipe: Any, source: Any, token: Any, tokenizer: Any, text_encoder: Any, **options: Any
) -> None:
    """Load a textual inversion into a pipeline of an ensemble; the arguments are those of the stock method.

    Raises UserError for a broken file, and for vectors that are no numbers, or not as wide as the text
    encoders; ValueError, as the stock one does, for a word that is known already.
    """
    for one in source if isinstance(source, list) else [source]:
        if isinstance(one, (str, Path)) and Path(one).is_file() and Path(one).suffix == ".safetensors":
            broken = first_not_finite(load_tensors(Path(one)).items())
            if broken is not None:
                raise UserError(
                    f"{one}: {broken} is not finite (NaN or infinite numbers); download or export it again"
                )
    stock = type(pipe).load_textual_inversion
    host, words = _parts(pipe, tokenizer, text_encoder)

    def load(one: Any, encoder: Any) -> None:
        try:
            stock(pipe, source, token, one, encoder, **options)
        except ValueError as error:
            if "incorrect shape" not in str(error):
                raise
            width = encoder.get_input_embeddings().weight.shape[-1]
            which = "give text_encoder= and tokenizer= of the encoder it was trained for"
            raise UserError(
                f"the textual inversion does not fit text encoders that are {width} wide; {which}"
            ) from None

    _for_all(host, words, load)


def unload_inversion(pipe: Any, tokens: Any, tokenizer: Any, text_encoder: Any) -> None:
    """The same for unload_textual_inversion."""
    stock = type(pipe).unload_textual_inversion
    host, words = _parts(pipe, tokenizer, text_encoder)
    _for_all(host, words, lambda one, encoder: stock(pipe, tokens, one, encoder))


def _parts(pipe: Any, tokenizer: Any, text_encoder: Any) -> tuple[Any, Any]:
    """The given text encoder and tokenizer, or the pipeline's first."""
    return text_encoder or pipe.text_encoder, tokenizer or pipe.tokenizer


def _for_all(host: Any, tokenizer: Any, change: Any) -> None:
    """Change all text encoders of a drop-in, each with a copy of the tokenizer; the last gets the tokenizer.

    Encoders that share their embedding (they differ by a LoRA only) still share it afterwards.
    """
    encoders = list(host.encoders) if isinstance(host, EnsembleTextEncoder) else [host]
    groups: dict[int, list[Any]] = {}
    for encoder in encoders:
        groups.setdefault(id(encoder.get_input_embeddings().weight), []).append(encoder)
    for place, (first, *others) in enumerate(groups.values(), start=1):
        change(tokenizer if place == len(groups) else copy.deepcopy(tokenizer), first)
        vectors = first.get_input_embeddings().requires_grad_(False)
        for other in others:
            other.set_input_embeddings(vectors)
            other.config.vocab_size = first.config.vocab_size
