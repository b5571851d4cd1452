"""The sentences of a report: which methods ours beats, which beat it, which comparisons are undecided.

They claim no more than the corrected tests allow.
"""

import math
from dataclasses import dataclass

from afa.evaluation.columns import Column, Comparison
from afa.evaluation.compare import EXPERT, OURS, RIVALS, Analysis
from afa.evaluation.rows import STUDENTS
from afa.pages.advice import WORDS, Advice, Candidate, for_comparison
from afa.pages.numbers import decimals, number, plural, probability, with_interval
from afa.pages.tables import GROUP_TITLES
from afa.stats import LEVEL, SEVERAL, kept_share


@dataclass(frozen=True)
class Headline:
    """The sentences of one leading metric.

    lead:  about the best single expert
    kinds: (kind of method, sentence about our method against methods of this kind)
    """

    metric: str
    lead: str
    kinds: list[tuple[str, str]]


def headlines(one: Analysis) -> list[Headline]:
    """Return one for every leading metric."""
    return [Headline(column.metric, _lead(one, column), _kinds(one, column)) for column in one.primary]


def advice(one: Analysis) -> Advice:
    """Return which method to use, and what that rests on.

    It is about our method; without one, about the best single expert.
    """
    proposed = one.ours if one.ours in one.lead.values else one.lead.best
    metric = one.lead.metric
    if proposed is None:
        return Advice(
            f"Undecided: by {metric} there is neither our method nor a single expert to compare with."
        )
    roles = {one.lead.leader(one.group("merge")): "the best merge", one.lead.best: "the best single expert"}
    found = []
    for name in one.group(EXPERT, *RIVALS, OURS):
        against = [column.against(proposed, name) for column in one.primary]
        if against[0] is not None:
            verdicts = [(comparison and comparison.verdict) or "undecided" for comparison in against]
            of = verdicts, against[0].difference, one.seconds.get(name), roles.get(name, "")
            found.append(Candidate(one.title(name), *of))
    enough = f"; {plural(one.least, 'prompt')} are needed for that, here are {one.prompts}"
    few = enough if one.prompts < one.least else ""
    missing = len(one.group(EXPERT, *RIVALS, OURS)) - 1 - len(found)
    lost = f"{plural(missing, 'method')} could not be compared." if missing else ""
    return for_comparison(one.title(proposed), one.seconds.get(proposed), metric, found, few, lost)


def terms(one: Analysis) -> str:
    """Return what the sentences rest on: prompts, images, training seeds, and the rule of a verdict."""
    prompts, images = plural(one.prompts, "independent prompt"), plural(len(one.results.items), "image")
    enough = f"it needs at least {one.least} independent prompts for {'this' if one.family == 1 else 'that'}"
    return (
        f"{prompts}, {images} a method, {_seeds(one)}. A verdict is given only where the 95 % interval of the"
        f" paired difference excludes zero and p < {LEVEL} after Holm's correction over"
        f" {plural(one.family, 'comparison')};"
        f" {enough}{', so none is possible here' if one.prompts < one.least else ''}."
    )


def _seeds(one: Analysis) -> str:
    """Return how many training seeds our method's comparisons have, and what that means."""
    shared = [
        len(found.seeds)
        for column in one.primary
        for found in column.comparisons.values()
        if one.ours in (found.method, found.other)
    ]
    counts = sorted({count for count in shared if count})
    if not counts:
        return "nothing trained"
    words = (
        plural(counts[-1], "training seed")
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} shared training seeds"
    )
    if counts[0] >= SEVERAL:
        return f"{words}: intervals and p are for other seeds, too"
    few = f"with fewer than {SEVERAL} " if counts[-1] >= SEVERAL else ""
    return f"{words}: {few}verdicts are about these trained models, others would spread further"


def _lead(one: Analysis, column: Column) -> str:
    by = f"By {column.metric} ({'higher' if column.note.higher_is_better else 'lower'} is better)"
    if one.ours is None:
        return f"{by} nothing is claimed: the evaluation has no method of group '{OURS}'."
    found = column.against(one.ours, column.best)
    if found is None:
        missing = f"{one.title(one.ours)} has no value"
        if column.best is None:
            missing = "there is no single expert to compare with"
        return f"{by} nothing can be said about the best single expert: {missing}."
    here = (
        f", as trained here ({plural(len(found.seeds), 'seed')})," if 0 < len(found.seeds) < SEVERAL else ""
    )
    verdict = {**WORDS, "undecided": "not distinguishable from"}[found.verdict]
    best = f"the best single expert, {one.title(found.other)}"
    return f"{by} {one.title(one.ours)}{here} is {verdict} {best}: {figures(found)}."


def figures(found: Comparison) -> str:
    """Return a difference with its interval, its corrected p, and its values by training seed."""
    places = decimals([found.difference])
    p = ""
    if found.p_holm is not None:
        p = f", p {'' if found.p_holm < 0.001 else '= '}{probability(found.p_holm)}"
    by_seed = zip(found.seeds, found.by_seed, strict=True)
    seeds = ", ".join(f"{number(value, places, True)} with seed {seed}" for seed, value in by_seed)
    several = f" ({seeds})" if 1 < len(found.seeds) < SEVERAL else ""
    return f"{with_interval(found.difference, places, True)}{p}{several}"


def _kinds(one: Analysis, column: Column) -> list[tuple[str, str]]:
    """Return for every kind of method how many of them ours beats, and the names of the others."""
    kinds = []
    for group in (EXPERT, *RIVALS, OURS) if one.ours is not None else ():
        against = [column.against(str(one.ours), name) for name in one.group(group)]
        found = [comparison for comparison in against if comparison is not None]
        beaten, total = sum(own.verdict == "better" for own in found), len(found)
        every = "it" if total == 1 else "both" if total == 2 else f"all {total}"
        clauses = [f"better than {every if beaten == total else f'{beaten} of {total}'}"] if beaten else []
        for verdict in ("undecided", "worse"):
            named = [f"{one.title(own.other)} ({figures(own)})" for own in found if own.verdict == verdict]
            clauses += [f"{WORDS[verdict]} {', '.join(named)}"] if named else []
        kinds += [(GROUP_TITLES[group], f"{'; '.join(clauses)}.")] if found else []
    return kinds + _kept(one, column)


def _kept(one: Analysis, column: Column) -> list[tuple[str, str]]:
    """Return what share of our method's gain over the best merge each distilled model keeps."""
    merge = column.leader(one.group("merge"))
    students = [name for name in STUDENTS if name in column.samples]
    if not students or merge is None or one.ours is None or column.note.kind != "image":
        return []
    sign = 1 if column.note.higher_is_better else -1
    of = {name: sign * column.samples[name].scores for name in (merge, one.ours, *students)}
    if len({scores.shape[1] for scores in of.values()}) > 1:
        return []
    shares = {name: kept_share(of[name], of[merge], of[one.ours]) for name in students}
    words = [
        f"{one.title(name)} {share.words(2)}" if math.isfinite(share.low) else f"{one.title(name)}: undecided"
        for name, share in shares.items()
    ]
    what = f"share of the gain over the best merge, {one.title(merge)}, that is kept"
    return [("One model out", f"{what}: {'; '.join(words)}.")]
