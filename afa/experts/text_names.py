"""Which text encoder a file or a folder holds, by its tensors, and their names in transformers.

Read are the names of transformers, of ComfyUI (the same, with or without `model.`, and without what text does
not need: the head over the vocabulary, FLUX.2's vision tower and its layers after the 30th), of OpenCLIP, and
of llama.cpp for T5 and Qwen3.
llama.cpp's names: https://github.com/ggml-org/llama.cpp (gguf-py/gguf/tensor_mapping.py)
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.folders import read_folder
from afa.experts.gguf_files import SUFFIX
from afa.experts.headers import Tensors, read_file
from afa.experts.layouts import Layout, vae_layout
from afa.experts.transformer_names import transformer_in

# what transformers calls a kind (model_type) -> its name in sentences
KINDS = {
    "clip_text_model": "CLIP",
    "t5": "T5",
    "qwen3": "Qwen3",
    "qwen3_vl": "Qwen3-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "mistral3": "Mistral",
    "gemma2": "Gemma 2",
}
# before a text encoder's names in a file with a transformer: ComfyUI's checkpoints, and Stability's of SD 3
BESIDE = re.compile(r"^text_encoders\.[^.]+\.transformer\.")
BEGIN = re.compile(r"^(model\.)?(language_model\.)?(model\.)?(text_model\.)?")
EMBEDDINGS = (
    "embed_tokens.weight",
    "embeddings.token_embedding.weight",
    "token_embedding.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
)
LAYER = re.compile(r"^(?:transformer\.resblocks|encoder\.layers|encoder\.block|layers)\.(\d+)\.")
OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
VISION = ("visual.", "vision_tower.", "multi_modal_projector.")
# Parts of a model that texts do not pass through; where a file lacks one, the model is made without it.
UNUSED = ("lm_head", *(name.rstrip(".") for name in VISION))
# kind -> the last layer whose states a pipeline reads, with which files may end (Flux2Pipeline.encode_prompt)
LAST_LAYER = {"Mistral": 30}
FROM_LLAMA_CPP = {
    "T5": (
        (r"^token_embd\.", "shared."),
        (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
        (r"^enc\.blk\.(\d+)\.attn_(q|k|v|o)\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
        (
            r"^enc\.blk\.(\d+)\.attn_rel_b\.",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
        ),
        (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
        (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    ),
    "Qwen3": (
        (r"^token_embd\.", "embed_tokens."),
        (r"^output_norm\.", "norm."),
        (r"^output\.", "lm_head."),
        (r"^blk\.(\d+)\.attn_(q|k|v)\.", r"layers.\1.self_attn.\2_proj."),
        (r"^blk\.(\d+)\.attn_output\.", r"layers.\1.self_attn.o_proj."),
        (r"^blk\.(\d+)\.attn_(q|k)_norm\.", r"layers.\1.self_attn.\2_norm."),
        (r"^blk\.(\d+)\.attn_norm\.", r"layers.\1.input_layernorm."),
        (r"^blk\.(\d+)\.ffn_norm\.", r"layers.\1.post_attention_layernorm."),
        (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"layers.\1.mlp.\2_proj."),
    ),
}


@dataclass(frozen=True)
class TextLayout(Layout):
    """How a file names the tensors of a text encoder.

    kind: a name of KINDS
    """

    kind: str = ""

    def to_diffusers(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by transformers' names. See Layout."""
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        named = {
            _plain(name.removeprefix(self.prefix), self.kind): tensor for name, tensor in tensors.items()
        }
        if OPEN_CLIP in named:
            named = dict(convert_open_clip_checkpoint(model, named, prefix=""))
            named = {_plain(name, self.kind): tensor for name, tensor in named.items()}
        elif "text_projection" in named:  # as ComfyUI once saved it, and OpenCLIP has it
            named["text_projection.weight"] = named.pop("text_projection").T
        own = {_plain(name, self.kind): name for name in model.state_dict()}
        return {own.get(name, name): tensor for name, tensor in named.items()}


@dataclass(frozen=True)
class TextEncoderFile:
    """A text encoder in a file or a folder, by the headers of its tensors.

    place:   the file, or the folder
    kind:    a name of KINDS
    tensors: by transformers' names without what stands before them
    prefix:  what stands before its names in a file that holds more than it
    """

    place: Path
    kind: str
    tensors: Tensors
    prefix: str = ""

    @cached_property
    def width(self) -> int:
        """The width D of its states."""
        return self.embedding[1]

    @cached_property
    def layers(self) -> int:
        """How many layers it has."""
        return 1 + max(int(found[1]) for name in self.tensors if (found := LAYER.match(name)))

    @property
    def embedding(self) -> tuple[int, ...]:
        """The shape of the table of its tokens: how many, how wide."""
        shape = next((self.tensors[name].shape for name in EMBEDDINGS if name in self.tensors), ())
        if len(shape) != 2:
            raise UserError(
                f"{self.place} is a {self.kind} text encoder without the table of its tokens; it is "
                "incomplete: download or export it again"
            )
        return shape

    @property
    def layout(self) -> TextLayout:
        """How it names its tensors."""
        return TextLayout("text_encoder", self.prefix, kind=self.kind)

    def __str__(self) -> str:
        return f"a {self.kind} of width {self.width:,}"

    def settings(self, config: Mapping[str, Any], of: str) -> dict[str, Any]:
        """The settings of its model, with as many layers as it has.

        config: the content of the config.json of a model of its kind
        of:     what the config is of, for the message
        Raises UserError for another number of layers, unless the last ones are those that no pipeline reads.
        """
        name = "text_config" if "text_config" in config else None
        text = config[name] if name else config
        key = "num_layers" if "num_layers" in text else "num_hidden_layers"
        expected = text.get(key, self.layers)
        if self.layers == expected:
            return dict(config)
        if not LAST_LAYER.get(self.kind, expected) <= self.layers < expected:
            raise UserError(
                f"{self.place} is {self} with {self.layers} layers, {of} expects {expected}; give the text "
                "encoder that the model was trained with"
            )
        fewer = {**text, key: self.layers}
        return {**config, name: fewer} if name else fewer

    def reduce(self, model: Any, shortened: bool = False) -> None:
        """Take out of a model what the file leaves out and texts do not pass through.

        A model that lacks something has the place of its file as `left_out`: it is not saved as a whole one.
        shortened: whether the file lacks the last layers. The states after its own last one are read as they
                   are between layers, so they must not pass the norm that follows all layers.
        """
        there = {name.partition(".")[0] for name in self.tensors}
        tied = getattr(model.config, "tie_word_embeddings", False)  # then the head is the table of tokens
        absent = {name for name in UNUSED if name not in there and not (tied and name == "lm_head")}
        absent |= {"norm"} if shortened else set()
        gone = [name for name, _ in model.named_modules() if _plain(f"{name}.", "").rstrip(".") in absent]
        for place in gone:
            model.set_submodule(place, nn.Identity())
        model.left_out = str(self.place) if gone else None


def text_encoder_in(place: Path) -> TextEncoderFile:
    """The text encoder in a file or a folder. Raises UserError if there is none that is known here."""
    if not place.exists():
        raise UserError(f"--text-encoder {place}: there is no such file or folder")
    if place.is_file() and place.suffix not in (".safetensors", SUFFIX):
        raise UserError(
            f"--text-encoder {place} is a '{place.suffix}' file; text encoders are .safetensors or .gguf "
            "files, or folders of transformers (convert pickles first)"
        )
    found = read_folder(place) if place.is_dir() else read_file(place)
    kind = kind_in(found)
    if kind is None:
        raise UserError(f"--text-encoder {place} {_strange(found, place)}")
    return TextEncoderFile(place, kind, {_plain(name, kind): entry for name, entry in found.items()})


def text_encoders_beside(file: Path) -> list[TextEncoderFile]:
    """The text encoders of known kinds that a file holds beside a transformer. Most hold none."""
    by_prefix: dict[str, Tensors] = {}
    for name, entry in read_file(file).items():
        if (found := BESIDE.match(name)) is not None:
            by_prefix.setdefault(found[0], {})[name.removeprefix(found[0])] = entry
    return [
        TextEncoderFile(file, kind, {_plain(name, kind): entry for name, entry in tensors.items()}, prefix)
        for prefix, tensors in by_prefix.items()
        if (kind := kind_in(tensors)) is not None
    ]


def kind_in(names: Collection[str]) -> str | None:
    """The kind of text encoder that has these tensors; None if none is known."""
    if "enc.blk.0.attn_q.weight" in names:
        return "T5"
    if "blk.0.attn_q_norm.weight" in names and "blk.0.post_ffw_norm.weight" not in names:
        return "Qwen3"
    plain = {_plain(name, "") for name in names}
    if OPEN_CLIP in plain or {"encoder.layers.0.self_attn.q_proj.weight", EMBEDDINGS[1]} <= plain:
        return "CLIP"
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in plain:
        return "T5"
    attention = "layers.0.self_attn."
    if f"{attention}q_proj.weight" not in plain:
        return None
    normed, gemma = f"{attention}q_norm.weight" in plain, "layers.0.pre_feedforward_layernorm.weight" in plain
    sees = any(name.startswith(VISION) for name in plain)
    if gemma:
        return None if normed else "Gemma 2"
    if normed:
        return "Qwen3-VL" if sees else "Qwen3"
    if f"{attention}q_proj.bias" in plain:
        return "Qwen2.5-VL" if sees else None
    return "Mistral"


def _plain(name: str, kind: str) -> str:
    """A tensor's name as transformers has it, without what stands before it.

    kind: whose names by llama.cpp are read
    """
    if name.startswith(("blk.", "enc.", "token_embd.", "output")):
        for old, new in FROM_LLAMA_CPP.get(kind, ()):
            name = re.sub(old, new, name)
    return BEGIN.sub("", name)


def _strange(names: Collection[str], place: Path) -> str:
    """Why a place holds no text encoder that is read, and what to do."""
    known = ", ".join(KINDS.values())
    if any(name.startswith(("blk.", "token_embd.")) for name in names):
        return (
            "has llama.cpp's names of a model that is not read from GGUF (T5 and Qwen3 are; others are "
            "stored there with other numbers, or without their vision part); give it as .safetensors"
        )
    if vae_layout(names) is not None:
        return "is a VAE; give it as --vae"
    if transformer_in(names) is not None:
        return "is a transformer of a diffusion model, an expert; give it where experts are given"
    return (
        f"holds no text encoder that is known here ({known}); give the one that the expert was trained with"
    )
