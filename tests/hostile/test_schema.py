"""afa.schema: every value of another kind than a hint asks for is refused in one sentence that names file and key."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hostile import WRONG

from afa.errors import UserError
from afa.schema import Like, Score, Sha256, Within, build


class Extra(TypedDict):
    size: Annotated[int, Within(1, 100)]
    note: NotRequired[str]


@dataclass
class Inner:
    source: str
    commit: str | None = None
    scores: list[float] = field(default_factory=list)


@dataclass
class Outer:
    inner: list[Inner]
    kind: Literal["a", "b"]
    by_name: dict[str, Inner]
    extra: Extra
    digest: Sha256
    flag: bool = False
    share: float = 0.5
    score: Score | None = None


def good() -> dict[str, Any]:
    one = {"source": "x", "commit": None, "scores": [1, 2.5]}
    return {"inner": [one], "kind": "a", "by_name": {"n": one}, "extra": {"size": 3, "other": [1]}, "digest": "0" * 64, "score": float("nan")}


def test_what_fits_is_built():
    built = build(Outer, good(), "f.json")
    assert built.inner == [Inner("x", None, [1.0, 2.5])] == list(built.by_name.values())
    assert built.extra == {"size": 3, "other": [1]} and isinstance(built.inner[0].scores[0], float)


TEXTS = {"text", "empty", "path", "markup"}
NUMBERS = {"int", "negative", "float"}
FITS = {  # place -> the values of WRONG that are right there
    ("inner",): {"empty list"}, ("inner", 0): set(), ("inner", 0, "source"): TEXTS, ("inner", 0, "commit"): TEXTS | {"null"},
    ("inner", 0, "scores"): {"empty list"}, ("inner", 0, "scores", 0): NUMBERS, ("kind",): set(), ("by_name",): {"empty dict"},
    ("by_name", "n"): set(), ("extra",): set(), ("extra", "size"): {"int"}, ("digest",): set(), ("flag",): {"bool"},
    ("share",): NUMBERS, ("score",): NUMBERS | {"null", "nan", "inf"},
}  # fmt: skip


@pytest.mark.parametrize("place", FITS, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_value_of_another_kind_is_refused_with_file_and_key(place, wrong):
    data: Any = good()
    inner = data
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = WRONG[wrong]
    if wrong in FITS[place]:
        build(Outer, data, "f.json")
        return
    with pytest.raises(UserError) as error:
        build(Outer, data, "f.json")
    last = place[-1] if isinstance(place[-1], str) else f"[{place[-1]}]"
    assert str(error.value).startswith("f.json: ") and last in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_the_sentence_names_key_found_and_expected():
    with pytest.raises(UserError, match=r"^e/afa\.json: \[0\]\.commit is 3 \(a number\), expected text or null$"):
        build(list[Inner], [{"source": "x", "commit": 3}], "e/afa.json")


@pytest.mark.parametrize(("change", "word"), [({"kind": None}, "kind"), ({"typo": 1}, '"typo"'), ({"extra": {}}, "extra.size")])
def test_a_key_that_is_missing_or_unknown_is_named(change, word):
    data = good() | change
    with pytest.raises(UserError, match=word):
        build(Outer, data, "f.json")
    del data["digest"]
    with pytest.raises(UserError):
        build(Outer, data, "f.json")


def test_deep_nesting_is_refused_where_anything_may_stand():
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UserError, match="inside each other"):
        build(Extra, {"size": 1, "other": deep}, "f.json")


def test_patterns_speak_in_words():
    with pytest.raises(UserError, match="expected a colour"):
        build(Annotated[str, Like("red|blue", "a colour")], "green", "f.json")
