"""Textual inversions for all experts: a word that is added to the tokenizer once, and its vectors to every text encoder behind it."""

import copy
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.finite import first_not_finite
from afa.experts.headers import load_tensors
from afa.text import EnsembleTextEncoder


def load_inversion(pipe: Any, source: Any, token: Any, tokenizer: Any, text_encoder: Any, **options: Any) -> None:
    """What a pipeline of an ensemble does in the place of the stock load_textual_inversion, with its arguments.

    Raises UserError for a broken file, and for vectors that are no numbers, or not as wide as the text encoders; ValueError, as
    the stock one does, for a word that is known already.
    """
    for one in source if isinstance(source, list) else [source]:
        if isinstance(one, (str, Path)) and Path(one).is_file() and Path(one).suffix == ".safetensors":
            broken = first_not_finite(load_tensors(Path(one)).items())
            if broken is not None:
                raise UserError(f"{one}: {broken} is not finite (NaN or infinite numbers); download or export it again")
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
            raise UserError(f"the textual inversion does not fit text encoders that are {width} wide; {which}") from None

    _for_all(host, words, load)


def unload_inversion(pipe: Any, tokens: Any, tokenizer: Any, text_encoder: Any) -> None:
    """The same for unload_textual_inversion."""
    stock = type(pipe).unload_textual_inversion
    host, words = _parts(pipe, tokenizer, text_encoder)
    _for_all(host, words, lambda one, encoder: stock(pipe, tokens, one, encoder))


def _parts(pipe: Any, tokenizer: Any, text_encoder: Any) -> tuple[Any, Any]:
    """The text encoder and tokenizer that are meant; by default a pipeline's first."""
    return text_encoder or pipe.text_encoder, tokenizer or pipe.tokenizer


def _for_all(host: Any, tokenizer: Any, change: Any) -> None:
    """Change every text encoder behind one, each with a tokenizer that does not know the word yet; the real one learns it last.

    Encoders that share their vectors (a LoRA beside them is all that differs) go on to share them.
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
