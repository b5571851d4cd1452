"""Prompts from files and flags, and warnings about parts that a pipeline does not read as they are meant."""

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.prompt_syntax import A1111, PLAIN
from afa.text_files import check_text, clean, read_json_lines, read_text, split_lines

CHUNK = 1000  # prompts that are tokenized at once
SHOWN, LONGEST = 5, 160  # pieces of syntax, and characters of what is cut, in a sentence
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# What the web UIs, ComfyUI and compel read as commands, and diffusers' pipelines as words.
OF_A1111 = (
    rf"\([^()]*:\s*{NUMBER}\s*\)",  # (word:1.2)
    rf"\[[^\[\]]*:\s*{NUMBER}\s*\]",  # [from:to:0.5], [word:10]
    r"\[[^\[\]]*\|[^\[\]]*\]",  # [one|other]
    r"\(\([^()]*\)\)",  # ((word))
    r"\\[()\[\]]",  # an escaped bracket
    r"<(?:lora|lyco|hypernet):[^<>]*>",
)
OF_OTHERS = (
    r"\{[^{}]*\|[^{}]*\}",  # {one|other}
    r"\([^()]*\)(?:\++|-+)(?=[\s,.]|$)",  # (words)++
    r"\bembedding:[\w.-]+",
    r"__[\w*/-]+__",  # a file of wildcards
)
SYNTAX = re.compile("|".join((*OF_A1111, *OF_OTHERS)), re.IGNORECASE)
FOREIGN = re.compile("|".join(OF_OTHERS), re.IGNORECASE)
WORDS = re.compile(r"\bBREAK\b|(?<=\s)AND(?=\s)")  # in a prompt that is not all in capitals
FILE_OF_WEIGHTS = re.compile(r"<(?:lora|lyco|hypernet):", re.IGNORECASE)

IN_CHUNKS = "prompt syntax a1111 (--prompt-syntax a1111) reads all of it, in chunks"
AS_A1111 = "prompt syntax a1111 (--prompt-syntax a1111) reads it as A1111 does"

_printed: set[str] = set()


def warn_of_prompts(
    prompts: Sequence[str],
    interface: Any,
    tokenizers: Sequence[Any],
    what: str = "prompt",
    syntax: str | None = None,
) -> None:
    """Warn on stderr about parts of prompts that are not read as they are meant; each sentence is printed
    once.

    prompts:    texts
    interface:  how the family's denoiser is called, see afa.stages.interface
    tokenizers: those of the pipeline
    what:       what messages call them: prompt or caption
    syntax:     how they are read, see afa.prompt_syntax; None: plainly, and nothing else can be asked for
    """
    for sentence in unread(prompts, interface, tokenizers, what, syntax):
        if sentence not in _printed:
            _printed.add(sentence)
            print(f"afa: {sentence}", file=sys.stderr)
    for handler in logging.getLogger("diffusers").handlers:  # whose pipelines say so again, batch by batch
        if _truncation not in handler.filters:
            handler.addFilter(_truncation)


def unread(
    prompts: Sequence[str],
    interface: Any,
    tokenizers: Sequence[Any],
    what: str = "prompt",
    syntax: str | None = None,
) -> list[str]:
    """The sentences of warn_of_prompts(); empty if everything is read as it is meant."""
    lost = [] if syntax == A1111 else cut_off(prompts, interface, tokenizers, what)
    if syntax == PLAIN and interface.weighted_prompts:
        lost = (f"{sentence}; {IN_CHUNKS}" for sentence in lost)
    return [*lost, *plain_text(prompts, what, syntax if interface.weighted_prompts else None)]


def _truncation(record: logging.LogRecord) -> bool:
    """Drop diffusers' own warning about prompts that are cut off, which it repeats for every batch."""
    return "was truncated because" not in str(record.msg)


def cut_off(
    prompts: Sequence[str], interface: Any, tokenizers: Sequence[Any], what: str = "prompt"
) -> Iterator[str]:
    """Yield a sentence if prompts are longer than the text encoders read, with a part that is lost."""
    window, lost = lost_parts(prompts, interface, tokenizers)
    if lost:
        index, part = next(iter(lost.items()))
        shown = part.strip() if len(part) <= LONGEST else f"{part[:LONGEST].strip()}…"
        which = f" of {what} {index + 1}" if len(prompts) > 1 else ""
        yield (
            f"{_of(lost, prompts, what)} longer than the {window} tokens that the text encoder reads; "
            f'cut off{which}: "{shown}"'
        )


def lost_parts(
    prompts: Sequence[str], interface: Any, tokenizers: Sequence[Any]
) -> tuple[int, dict[int, str]]:
    """The parts of prompts that text encoders do not read.

    prompts, interface, tokenizers: see warn_of_prompts
    Returns the number of tokens that are read, special tokens included, and prompt's index -> the lost text.
    """
    tokenizer, window = _widest(interface, tokenizers)
    if tokenizer is None:
        return 0, {}
    room, lost = window - tokenizer.num_special_tokens_to_add(), {}
    for start in range(0, len(prompts), CHUNK):
        batch = list(prompts[start : start + CHUNK])
        found = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for index, (prompt, places) in enumerate(zip(batch, found["offset_mapping"], strict=True), start):
            if len(places) > room:
                lost[index] = prompt[places[room][0] :]
    return window, lost


def plain_text(prompts: Sequence[str], what: str = "prompt", syntax: str | None = None) -> Iterator[str]:
    """Yield a sentence if prompts have another program's syntax, with what is read as plain text.

    syntax: how they are read; None: plainly, and nothing else can be asked for
    """
    found = [(index, pieces) for index, prompt in enumerate(prompts) if (pieces := _pieces(prompt, syntax))]
    if found:
        pieces = list(dict.fromkeys(piece for _, several in found for piece in several))
        shown = ", ".join(pieces[:SHOWN]) + (", …" if len(pieces) > SHOWN else "")
        advice = (
            "; a LoRA is given as EXPERT+FILE*STRENGTH" if any(map(FILE_OF_WEIGHTS.match, pieces)) else ""
        )
        if syntax == PLAIN and not all(map(FOREIGN.fullmatch, pieces)):
            advice += f"; {AS_A1111}"
        yield (
            f"{_of(found, prompts, what)} written in another program's syntax, "
            f"which is read as plain text here: {shown}{advice}"
        )


def _of(some: Sized, all_of_them: Sequence[str], what: str) -> str:
    """How many of the prompts, with the verb."""
    if len(all_of_them) == 1:
        return f"the {what} is"
    return f"{len(some)} of {len(all_of_them)} {what}s {'is' if len(some) == 1 else 'are'}"


def _pieces(prompt: str, syntax: str | None = None) -> list[str]:
    if syntax == A1111:
        return [found.group() for found in FOREIGN.finditer(prompt)]
    capitals = prompt.isupper()
    return [found.group() for found in SYNTAX.finditer(prompt)] + ([] if capitals else WORDS.findall(prompt))


def reader_of(tokenizer: Any) -> Any:
    """Return the tokenizer of text in a processor of text and images; other tokenizers as they are."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _widest(interface: Any, tokenizers: Sequence[Any]) -> tuple[Any, int]:
    """The tokenizer that reads the most of a prompt, and how many tokens it reads; (None, 0) if there is
    none.

    CLIP's tokenizers have a limit of their own; for others the pipeline has one.
    """
    import diffusers

    if not tokenizers:
        return None, 0
    taken = inspect.signature(
        getattr(diffusers, interface.pipeline_name(len(tokenizers))).__call__
    ).parameters
    longest = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
    windows = []
    for tokenizer in map(reader_of, tokenizers):
        if tokenizer is not None and getattr(tokenizer, "is_fast", False):
            own_limit = "CLIP" in type(tokenizer).__name__ or not longest
            most = tokenizer.model_max_length if own_limit else interface.prompt_room(tokenizer, longest)
            windows.append((tokenizer, most))
    return max(windows, key=lambda pair: pair[1], default=(None, 0))


# How a line of JSON begins. A line of wildcards, {red|blue} ring, does not begin so.
OBJECT = re.compile(r'\{\s*("|$)')


def prompt_numbers(prompts: Sequence[str]) -> list[int]:
    """Return the independent prompt of each image, counted from 0; equal prompts are one prompt.

    Statistics average the images of a prompt first, since they are draws of one prompt.
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(" ".join(prompt.split()), len(numbers)) for prompt in prompts]


def asked_prompts(prompt: Sequence[str] | None, file: str | None) -> list[str]:
    """The prompts of --prompt, or of the file of --prompts. Raises UserError for anything but text."""
    if prompt is None:
        return read_prompts(Path(str(file)))
    return [check_text(text, f"--prompt {number}") for number, text in enumerate(prompt, 1)]


def read_prompts(path: Path, flag: str = "--prompts", what: str = "prompt") -> list[str]:
    """Read prompts from a file: one a line, or JSON lines with "text"; empty lines are ignored.

    flag, what: the option and what it holds, for messages
    Raises UserError if there is none.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path} is no file")
    lines = [line for line in map(clean, split_lines(read_text(path))) if line]
    if path.suffix in (".jsonl", ".ndjson") or all(OBJECT.match(line) for line in lines):
        lines = [_text(place, entry) for place, entry in read_json_lines(path)]
    if not lines:
        raise UserError(f"{flag} {path} holds no {what}")
    return lines


def _text(place: str, entry: Any) -> str:
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place} has no "text"')
    return text
