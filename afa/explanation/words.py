"""The words of a prompt, and where their tokens stand in the text that aggregators see."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afa.experts.load import TOKENIZERS
from afa.families.table import called

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@dataclass(frozen=True)
class Word:
    """text: as written; the second "a" of a prompt is "a (2)". span: of its letters in the prompt.

    tokens: its places in the text states; none: it was cut off, or the tokenizer does not say.
    """

    text: str
    span: tuple[int, int]
    tokens: tuple[int, ...]

    def left_out(self, prompt: str) -> str:
        """The prompt without this word."""
        start, end = self.span
        return " ".join(f"{prompt[:start]} {prompt[end:]}".split())


def find_words(pipeline: Any, prompt: str, length: int) -> list[Word]:
    """The words of a prompt, in order. length: of the text states that aggregators see.

    Punctuation, the start and the end of the text, and padding are no words.
    """
    call, _ = called(pipeline)
    spans = [(found.group(), found.span()) for found in WORD.finditer(prompt)]
    places: list[list[int]] = [[] for _ in spans]
    offset = 0
    for index in call.read:
        tokenizer = getattr(pipeline, TOKENIZERS[index])
        room = min(length - offset, tokenizer.model_max_length)
        for place, (start, end) in enumerate(_offsets(tokenizer, prompt, room)):
            for own, (_, (first, last)) in zip(places, spans, strict=True):
                if start < last and end > first:
                    own.append(offset + place)
        offset += room
    labels = _numbered([text for text, _ in spans])
    return [Word(label, span, tuple(own)) for label, (_, span), own in zip(labels, spans, places, strict=True)]


def _offsets(tokenizer: Any, prompt: str, room: int) -> list[tuple[int, int]]:
    """Where in the prompt every token comes from; nowhere (0, 0) for what the tokenizer adds."""
    if not tokenizer.is_fast:
        return []
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=room)
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _numbered(texts: Sequence[str]) -> list[str]:
    """From the second time on, a word says which it is."""
    seen: Counter[str] = Counter()
    labels = []
    for text in texts:
        seen[text] += 1
        labels.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return labels
