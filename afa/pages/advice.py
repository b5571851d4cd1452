"""One sentence of advice for each report; every rule by which figures become advice is here.

"Better" and "worse" are said only where a comparison was decided after Holm's correction. What an interval
leaves open is called undecided, with what to do then.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afa.pages.numbers import count, decimals, number, plural, with_interval
from afa.significance import difference_tests, holm
from afa.stats import LEVEL, Estimate, differences, estimate, least_items

NAMED = 3  # methods that a sentence names; further ones are counted
AHEAD = 0.01  # of the weight, by which an expert must be ahead of the others to lead
VISIBLE = 2.55  # RMSE in levels of 255 that is hard to see: 1 % of the range, a PSNR of 40 dB
WORDS = {"better": "better than", "undecided": "undecided against", "worse": "worse than"}


@dataclass(frozen=True)
class Advice:
    """What to do, in one sentence, and what it rests on in one or two more."""

    sentence: str
    because: str = ""

    def __str__(self) -> str:
        return f"{self.sentence} {self.because}".strip()


def joined(names: Sequence[str]) -> str:
    """Join names: a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def some(names: Sequence[str]) -> str:
    """Join the first names, and count the others: a, b, c and 4 others."""
    more = len(names) - NAMED
    return joined(names if more <= 0 else [*names[:NAMED], plural(more, "other")])


def claims(found: Sequence[tuple[str, str]]) -> str:
    """Say what was decided: better than a and b; undecided against c.

    found: (name, verdict) each, a verdict as in WORDS
    """
    by = {verdict: [name for name, own in found if own == verdict] for verdict in WORDS}
    return "; ".join(f"{WORDS[verdict]} {joined(names)}" for verdict, names in by.items() if names)


# --- afa evaluate ---


@dataclass(frozen=True)
class Candidate:
    """A method that could be used instead.

    title:      as in the tables
    verdicts:   of the proposed method against this one, after Holm: by the leading metric, then by others
    difference: the proposed method minus this one, by the leading metric
    seconds:    of an image; None if not measured
    role:       "the best single expert" or "the best merge", else ""
    """

    title: str
    verdicts: Sequence[str]
    difference: Estimate
    seconds: Estimate | None = None
    role: str = ""

    @property
    def verdict(self) -> str:
        """The leading metric's, or undecided where another metric decides the other way."""
        return "undecided" if self.contradicted else self.verdicts[0]

    @property
    def contradicted(self) -> bool:
        return {"better", "worse"} <= set(self.verdicts)

    @property
    def named(self) -> str:
        return f"{self.role}, {self.title}" if self.role else self.title


def for_comparison(
    proposed: str, seconds: Estimate | None, metric: str, others: Sequence[Candidate], few: str, lost: str
) -> Advice:
    """Say which method to use, what it gains over the best expert and the best merge, and at what cost.

    proposed: title of the method that the comparisons are about
    seconds:  of one of its images; None if not measured
    metric:   the leading one
    others:   every other method
    few:      a clause that says that there are too few prompts; "" if there are enough
    lost:     a sentence about methods that could not be compared; "" if there are none
    """
    if not others:
        return Advice(f"Undecided: {proposed} was compared with no other method by {metric}.")
    by = {verdict: [one for one in others if one.verdict == verdict] for verdict in WORDS}
    references, own = [one for one in others if one.role], (proposed, seconds)
    if by["worse"]:
        chosen = max(by["worse"], key=lambda one: abs(one.difference.value))
        more = len(by["worse"]) - 1
        also = f"; {plural(more, 'other')} {'is' if more == 1 else 'are'}, too" if more else ""
        lead = f"Use {chosen.title}, not {proposed}: by {metric} it is better{also}"
        references = [chosen, *(one for one in references if one is not chosen)]
        cost = _cost((chosen.title, chosen.seconds), own)
    elif by["undecided"]:
        cheap = [one for one in by["undecided"] if _cheaper(one.seconds, seconds)]
        apart = f"{proposed} is not told apart from {some([one.title for one in by['undecided']])}"
        lead, cost = f"Undecided: {apart} by {metric}{few}", ""
        if torn := [one.title for one in by["undecided"] if one.contradicted]:
            lead += f"; another metric says the opposite of {metric} about {some(torn)}"
        if cheap:
            chosen = min(cheap, key=lambda one: one.seconds.value if one.seconds else np.inf)
            lead += f"; {chosen.title} costs less, so use it until more prompts decide"
            cost = _cost((chosen.title, chosen.seconds), own)
    else:
        every = "the other" if len(others) == 1 else f"all {count(len(others))} others"
        lead = f"Use {proposed}: by {metric} it is better than {every}"
        cost = _cost(own, *[(one.title, one.seconds) for one in references if one.seconds][:1])
    because = [f"{part}." for part in (_gains(proposed, references), cost) if part] + [lost]
    return Advice(f"{lead}.", " ".join(because).strip())


def _gains(proposed: str, references: Sequence[Candidate]) -> str:
    """Say how far the proposed method lies from some others."""
    if not references:
        return ""
    parts = [
        f"{WORDS[one.verdict]} {one.named}"
        f" ({with_interval(one.difference, decimals([one.difference]), signed=True)})"
        for one in references
    ]
    return f"{proposed} is {joined(parts)}"


def _cheaper(one: Estimate | None, other: Estimate | None) -> bool:
    return one is not None and other is not None and one.high < other.low


def _cost(*methods: tuple[str, Estimate | None]) -> str:
    """Say what an image costs by two methods: (title, seconds) each."""
    known = [(title, seconds) for title, seconds in methods if seconds is not None]
    if len(known) < 2:
        return ""
    places = max(0, decimals([seconds for _, seconds in known]) - 1)
    words = [f"{with_interval(seconds, places)} s with {title}" for title, seconds in known]
    return f"An image takes {joined(words)}"


# --- afa screen ---

ENSEMBLE, MERGE, ONE, UNKNOWN = "ensemble", "merge", "one", "unknown"


def for_screening(
    action: str, kept: Sequence[str], drop: Sequence[str], open_: Sequence[str], sure: bool, worth: float
) -> Advice:
    """Say which experts to keep, and what to do with them.

    action: ENSEMBLE, MERGE, ONE or UNKNOWN
    kept:   experts to use
    drop:   experts that surely add less than it is worth, or are copies
    open_:  experts that are left out, of which the interval does not say so
    sure:   whether the intervals exclude the other side of `worth`
    worth:  the least gain that pays, as a share of the loss
    """
    names, least = joined(kept) if kept else "", f"{100 * worth:g} %"
    leads = {
        (ENSEMBLE, True): f"Yes: combining {names} should pay",
        (ENSEMBLE, False): f"Undecided: combining {names} may pay, or gain less than {least};"
        " a short training would tell",
        (MERGE, True): f"No: merge {names} instead, at the price of one model",
        (
            MERGE,
            False,
        ): f"Merge {names}, at the price of one model; whether an ensemble adds {least} is undecided",
        (ONE, True): f"No: use {names} alone",
        (ONE, False): f"Use {names} alone; whether combining gains {least} is undecided",
    }
    lead = leads.get((action, sure), "Undecided: without captioned images (--data) there is no verdict")
    dropped = [name for name in drop if action != ONE or not sure]  # "alone" says it
    parts = [lead, f"drop {joined(dropped)}" if dropped else ""]
    parts.append(
        f"whether {joined(open_)} would add {least} is undecided" if open_ and action == ENSEMBLE else ""
    )
    return Advice("; ".join(filter(None, parts)) + ".")


# --- afa explain ---


def for_explanation(
    experts: Sequence[str],
    groups: Sequence[str],
    shares: NDArray[np.float64],
    unused: Sequence[str],
    changed: tuple[str, NDArray[np.float64]] | None,
) -> Advice:
    """Say whether the weights matter, who leads where, and which expert is not used.

    experts: names (N)
    groups:  names of the groups of stages (G)
    shares:  (images, G, N) mean weights
    unused:  experts that no image uses anywhere
    changed: a counterfactual's title, and (images,) its RMSE from the image as it is; None if none was made
    With few images this is about these images, on which all must agree; with enough, about others, too.
    """
    images = len(shares)
    enough = images >= least_items()
    few = "this image" if images == 1 else f"each of these {images} images"
    about = f"images like these (n = {images})" if enough else few
    by: dict[int | None, list[str]] = {}
    for group, leader in zip(groups, leaders(shares), strict=True):
        by.setdefault(leader, []).append(group)
    parts = [f"{experts[one]} leads in {joined(own)}" for one, own in by.items() if one is not None]
    if None in by:
        nowhere = (
            "none decidedly leads" if enough else "none leads" if images == 1 else "none leads in all of them"
        )
        parts.append(f"in {joined(by[None])} {nowhere}")
    used = (
        "every expert is used"
        if not unused
        else f"{joined(unused)} {'is' if len(unused) == 1 else 'are'} not used"
    )
    return Advice(f"{_matter(changed, about, enough)}.", f"On {about}, {joined(parts)}; {used}.")


def _matter(changed: tuple[str, NDArray[np.float64]] | None, about: str, enough: bool) -> str:
    """Say whether other weights change images by more than is hard to see."""
    if changed is None:
        return "Whether the weights matter was not tried (--counterfactuals equal)"
    title, values = changed
    found = estimate(values)
    low, high = (found.low, found.high) if enough else (float(values.min()), float(values.max()))
    size = with_interval(found, 1) if len(values) > 1 else number(found.value, 1)
    by = f"with {title}, {about} change{'' if enough else 's'} by {size} of 255 levels (RMSE)"
    if low > VISIBLE:
        return f"The weights matter: {by}"
    if high < VISIBLE:
        return f"The weights hardly matter: {by}, which is hard to see"
    return f"Undecided whether the weights matter: {by}, and {VISIBLE:g} is hard to see"


def leaders(shares: NDArray[np.float64]) -> list[int | None]:
    """Find the expert with the largest weight in each group of stages; None where that is undecided.

    shares: (images, G, N)
    It is ahead of every other expert by more than AHEAD. With few images, in each of them. With enough, the
    interval of the difference lies above AHEAD, and its p is below LEVEL after Holm's correction over all
    pairs of experts in all groups.
    """
    images, groups, experts = shares.shape
    if images < least_items():
        first, ranked = shares.argmax(2), np.sort(shares, axis=2)
        ahead = (ranked[..., -1] - ranked[..., -2] > AHEAD) & (first == first[0])
        return [int(first[0, group]) if ahead[:, group].all() else None for group in range(groups)]
    pairs = [(group, *pair) for group in range(groups) for pair in itertools.combinations(range(experts), 2)]
    samples = [(shares[:, group, one] - shares[:, group, other])[None] for group, one, other in pairs]
    leads = np.zeros((groups, experts, experts), bool)
    for (group, one, other), gap, p in zip(
        pairs, differences(samples), holm(difference_tests(samples)), strict=True
    ):
        if max(gap.low, -gap.high) > AHEAD and p < LEVEL and images >= least_items(len(pairs)):
            leads[(group, one, other) if gap.low > 0 else (group, other, one)] = True
    whole = leads.sum(2) == experts - 1
    return [int(whole[group].argmax()) if whole[group].any() else None for group in range(groups)]


# --- afa demo ---


def for_demonstration(value: Estimate, experts: int, ways: int, found: Sequence[tuple[str, str]]) -> Advice:
    """Say what the reader has just seen.

    value:   attribute accuracy of AFA
    experts: how many there are
    ways:    methods that were compared
    found:   (other method, AFA's verdict against it) each
    """
    share = f"{with_interval(value, 3)} of the attributes that {plural(value.n, 'caption')} ask for"
    return Advice(
        f"You have just seen {ways} ways to draw with {experts} experts that each draw only a part of a scene"
        f" well: AFA gets {share} right, {claims(found)}."
    )
