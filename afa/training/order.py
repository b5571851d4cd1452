"""The images of each step, which are of one size; every pass over the data takes all images."""

from collections.abc import Sequence

import numpy as np


def images_of_step(groups: Sequence[Sequence[int]], step: int, size: int, seed: int) -> list[int]:
    """Return the images of a step, which are of one group. They depend on nothing but the arguments.

    groups: the images of each size, each as often as it counts in a pass
    step:   counted from 0
    size:   images of a step, for all processes
    seed:   of the order
    Each group is taken pass by pass, in a new order each time. In a pass over the data a group takes as many
    steps as it needs to end its own pass; what the last of them takes too much counts for the next pass. So
    every image is seen in every pass, all steps are full, and no image is more than a step ahead. A single
    group takes its steps one after the other.
    """
    counts = [len(group) for group in groups]
    epoch = step * size // sum(counts)  # or an earlier one: a group's last step is rounded up
    while sum(_begun(count, epoch, size) for count in counts) > step:
        epoch -= 1
    firsts = [_begun(count, epoch, size) for count in counts]
    ends = [_begun(count, epoch + 1, size) for count in counts]
    turns = np.repeat(np.arange(len(groups)), [end - first for first, end in zip(firsts, ends, strict=True)])
    turns = np.random.default_rng((seed, epoch, len(groups))).permutation(turns)
    place = step - sum(firsts)
    group = int(turns[place])
    number = firsts[group] + int((turns[:place] == group).sum())  # of the group's steps

    places = [divmod(place, counts[group]) for place in range(number * size, (number + 1) * size)]
    own = () if len(groups) == 1 else (group + 1,)
    orders = {
        turn: np.random.default_rng((seed, turn, *own)).permutation(counts[group]) for turn, _ in places
    }
    return [groups[group][int(orders[turn][place])] for turn, place in places]


def _begun(count: int, passes: int, size: int) -> int:
    """Return how many steps a group of some images takes for some passes."""
    return -(-count * passes // size)
