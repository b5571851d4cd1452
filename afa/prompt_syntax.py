"""Prompts as AUTOMATIC1111's web UI reads them: weights of words, BREAK, chunks of the text encoder's window.

Source: AUTOMATIC1111/stable-diffusion-webui 1.10, modules/prompt_parser.py (what brackets mean) and
modules/sd_hijack_clip.py (how tokens are put into chunks). What differs is in docs/fidelity.md.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afa.errors import UserError
from afa.schema import shown
from afa.settings import check_number

PLAIN, A1111 = "plain", "a1111"
SYNTAXES = {PLAIN: "as they are", A1111: "as in A1111: (word:1.2), [word], BREAK, long prompts in chunks"}
BRACKET = 1.1  # round brackets multiply weights by it, square ones divide
BACKTRACK = 20  # tokens: a chunk ends at a comma that is at most so far back (A1111's default)
LARGEST = 100.0  # weight of a word, as it is written

# A prompt is a row of these: escaped characters, brackets, a weight with its bracket, text, lone colons.
PARTS = re.compile(r"\\[()\[\]\\]?|[(\[)\]]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
NETWORK = re.compile(r"<(\w+):([^<>]*)>")
ESCAPED = re.compile(r"\\[()\[\]\\]")
# What A1111 does besides, with what to do about it.
BRACKETS = "is not supported; leave it out, or put a backslash before its brackets"
LORAS = (
    "give LoRAs to an expert as EXPERT+FILE*STRENGTH, or to afa generate and afa ui with --lora-dir FOLDER"
)
UNREAD = (
    (
        NETWORK,
        f"names a file, which is not read here; {LORAS}",
    ),
    (re.compile(r"\[[^\[\]]*:\s*[+-]?[.\d]+\s*\]"), f"changes the prompt at a step, which {BRACKETS}"),
    (re.compile(r"\[[^\[\]]*\|[^\[\]]*\]"), f"changes words at every step, which {BRACKETS}"),
    (
        re.compile(r"\bAND\b"),
        "composes two prompts, which is not supported; leave it out, or write it in small letters",
    ),
)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    text:   what is tokenized
    weight: of its tokens; None: a BREAK, which has no text
    """

    text: str
    weight: float | None


@dataclass(frozen=True)
class Chunk:
    """What a text encoder reads in one pass.

    tokens:  ids, special tokens and padding included
    weights: one for each token; 1 for special tokens and padding
    read:    number of tokens before the padding
    """

    tokens: list[int]
    weights: list[float]
    read: int


@dataclass(frozen=True)
class NamedLora:
    """A LoRA that a prompt asks for: its name, without folder and ending, and its strength."""

    name: str
    strength: float


def check_syntax(prompts: Sequence[str], what: str = "prompt") -> None:
    """Check prompts in A1111's syntax. what: what messages call them.

    Raises UserError for what A1111 would do with them and afa does not, and for weights that are no numbers.
    """
    for number, prompt in enumerate(prompts, 1):
        which = f"{what} {number}" if len(prompts) > 1 else f"the {what}"
        bare = ESCAPED.sub("", prompt)
        for pattern, does in UNREAD:
            if found := pattern.search(bare):
                if pattern is NETWORK and what != "prompt":
                    does = "names a file, and a LoRA is of the whole picture; name it in the prompt"
                raise UserError(f"{which}: in a1111 syntax {shown(found.group())} {does}")
        read_weights(prompt, which)


def split_loras(prompt: str, which: str = "the prompt") -> tuple[str, list[NamedLora]]:
    """Take <lora:NAME:STRENGTH> out of a prompt.

    which: what messages call the prompt
    Returns the rest and the LoRAs, in order. Raises UserError for other files, and for other strengths.
    """
    loras: list[NamedLora] = []
    for found in NETWORK.finditer(prompt):
        kind, (name, *strengths) = found.group(1).lower(), found.group(2).split(":")
        text = shown(found.group())
        if kind not in ("lora", "lyco"):
            raise UserError(f"{which}: {text} names no LoRA, and other files are not read; leave it out")
        try:
            strength = float(strengths[0]) if strengths else 1.0
        except ValueError:
            raise UserError(f"{which}: the strength in {text} is no number; write <lora:NAME:0.8>") from None
        if len(strengths) > 1 or not name.strip():
            raise UserError(f"{which}: {text} is no <lora:NAME:STRENGTH>, such as <lora:style:0.8>")
        check_number(strength, f"{which}: the strength in {text} is", least=-LARGEST, most=LARGEST)
        loras.append(NamedLora(name.strip(), strength))
    return NETWORK.sub("", prompt), loras


def read_weights(prompt: str, which: str = "the prompt") -> list[Piece]:
    """Read brackets and BREAK.

    which: what messages call the prompt
    Returns the pieces in order; neighbours of one weight are one piece. Raises UserError for a weight that is
    no number.
    """
    texts: list[str] = []
    weights: list[float | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where brackets that are still open stand

    def add(text: str, weight: float | None = 1.0) -> None:
        texts.append(text)
        weights.append(weight)

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [None if weight is None else weight * factor for weight in weights[start:]]

    for found in PARTS.finditer(prompt):
        part, weight = found.group(), found.group("weight")
        if part.startswith("\\"):
            add(part[1:])  # before other characters, it is dropped
        elif part in opened:
            opened[part].append(len(texts))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), _weight(weight, which))
        elif part == ")" and opened["("]:
            multiply(opened["("].pop(), BRACKET)
        elif part == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / BRACKET)
        else:
            first, *others = BREAK.split(part)
            add(first)
            for text in others:
                add("", None)
                add(text)
    for start in opened["("]:  # as A1111 does: never closed, they reach to the end
        multiply(start, BRACKET)
    for start in opened["["]:
        multiply(start, 1 / BRACKET)
    return _merged(texts, weights)


def _weight(text: str, which: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"{which}: the weight {shown(text)} is no number; write (word:1.2)") from None
    check_number(weight, f"{which}: the weight is", least=-LARGEST, most=LARGEST)
    return weight


def _merged(texts: Sequence[str], weights: Sequence[float | None]) -> list[Piece]:
    pieces: list[Piece] = []
    for text, weight in zip(texts, weights, strict=True):
        if pieces and weight is not None and pieces[-1].weight == weight:
            pieces[-1] = Piece(pieces[-1].text + text, weight)
        else:
            pieces.append(Piece(text, weight))
    return pieces or [Piece("", 1.0)]


def make_chunks(pieces: Sequence[Piece], tokenizer: Any) -> list[Chunk]:
    """Put tokens into chunks of the text encoder's window, at least one.

    pieces:    see read_weights
    tokenizer: a CLIP tokenizer
    A chunk that is full ends at its last comma if that is near, and the words after it begin the next one.
    """
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    comma = tokenizer.get_vocab().get(",</w>")
    chunks: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    last_comma: int | None = None
    for piece in pieces:
        if piece.weight is None:
            chunks.append(chunk)
            chunk, last_comma = [], None
            continue
        for token in tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids:
            if token == comma:
                last_comma = len(chunk)
            elif len(chunk) == room and last_comma is not None and room - last_comma <= BACKTRACK:
                chunks.append(chunk[: last_comma + 1])
                chunk, last_comma = chunk[last_comma + 1 :], None
            if len(chunk) == room:
                chunks.append(chunk)
                chunk, last_comma = [], None
            chunk.append((token, piece.weight))
    if chunk or not chunks:
        chunks.append(chunk)
    return [_whole(chunk, tokenizer) for chunk in chunks]


def _whole(chunk: Sequence[tuple[int, float]], tokenizer: Any) -> Chunk:
    """Add special tokens and padding."""
    length = tokenizer.model_max_length
    tokens = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    weights = [1.0, *(weight for _, weight in chunk), 1.0]
    missing = length - len(tokens)
    return Chunk(tokens + [tokenizer.pad_token_id] * missing, weights + [1.0] * missing, len(tokens))
