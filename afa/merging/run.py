"""A merge of checkpoints, from files to a file or folder, key by key: never more than one key's tensors are in memory."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.experts.folders import forget_places
from afa.files import locked, replacing, staged
from afa.merging.folder import copy_surroundings
from afa.merging.layout import Item
from afa.merging.original import to_original
from afa.merging.parts import check_values, equal
from afa.merging.plan import Plan, check_output, make_plan
from afa.merging.recipe import hash_sources, metadata, same_parts
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader
from afa.merging.table import cast, find_merge, merge_key, say_fallen_back
from afa.merging.writer import write_safetensors


def merge_files(settings: MergeSettings, plan: Plan | None = None) -> dict[str, Any]:
    """Merge checkpoints from files to a file or folder. It needs the memory of one tensor of each.

    settings: as the flags of `afa merge`
    plan:     what make_plan(settings) returned
    Returns what was done, ready for JSON. Raises UserError.
    """
    plan = plan or make_plan(settings)
    with locked(Path(settings.output), file=settings.single_file):
        check_output(settings, [])  # another process may have written it meanwhile
        return _merge(plan)


def _merge(plan: Plan) -> dict[str, Any]:
    began = time.perf_counter()
    hashes = hash_sources(plan)
    once = same_parts(plan, hashes)
    total = sum(len(items) for items in plan.files.values())
    with Reader() as reader, tqdm(total=total, desc="merging", unit="tensor", file=sys.stderr) as bar:
        merge = FileMerge(plan, reader, once, bar)
        merge.write(metadata(plan, hashes))
    seconds = round(time.perf_counter() - began, 2)
    sha256 = {str(file): digest for file, digest in hashes.items()}
    say_fallen_back(plan.settings.method, merge.fallen_back, total)
    done = {"same_in_all": once, "fallen_back": merge.fallen_back, "sha256": sha256, "seconds": seconds}
    return plan.facts() | done


class FileMerge:
    """The tensors of a plan's result, made one at a time. once: parts that are taken from the first expert as they are."""

    def __init__(self, plan: Plan, reader: Reader, once: list[str], bar: Any) -> None:
        self.plan, self.reader, self.bar = plan, reader, bar
        self.merged = [part for part in plan.merged_parts if part not in once]
        self.rule = find_merge(plan.settings.method)
        self.fallen_back = 0  # tensors that the rule left as the base has them
        self.dtype = getattr(torch, plan.settings.dtype) if plan.settings.dtype else None

    def write(self, strings: dict[str, str]) -> None:
        """Write every file of the plan."""
        output = Path(self.plan.settings.output)
        if self.plan.settings.single_file:
            with replacing(output) as path:
                write_safetensors(path, self.plan.files[self.plan.settings.output], self.make, strings)
            return
        with staged(output, last="model_index.json") as stage:
            copy_surroundings(self.plan, stage)
            forget_places(stage)
            for name, items in self.plan.files.items():
                write_safetensors(stage / name, items, self.make, strings)

    @torch.no_grad()
    def make(self, item: Item) -> Tensor:
        """One tensor of the output."""
        self.bar.update()
        if item.spare is not None:
            spare = self.reader.read(item.spare)
            check_values(item.name, [spare], [self.plan.first.name])
            return spare
        if not item.keys:
            return torch.empty(0)
        return to_original([self.value(key) for key in item.keys], item.form)

    def value(self, key: str) -> Tensor:
        """One key's merged value, or the value of the expert it comes from."""
        part = key.partition(".")[0]
        sources = [self.plan.origin(part)]
        if part in self.merged:
            sources = [*self.plan.experts, *([self.plan.base] if self.plan.base else [])]
            sources = [source for source in sources if key in source.tensors]
        tensors = [self.reader.read(source.tensors[key]) for source in sources]
        check_values(key, tensors, [source.name for source in sources])
        first = tensors[0]
        if not first.is_floating_point() or all(equal(first, other) for other in tensors[1:]):
            return cast(first, self.dtype, key) if self.dtype and first.is_floating_point() else first
        base = tensors.pop() if self.plan.base else None
        where: dict[str, Any] = {"key": key, "stage": self.plan.stages[key], "dtype": self.dtype, "note": self._note}
        return merge_key(self.rule, tensors, base, **where, **self.plan.options)

    def _note(self) -> None:
        self.fallen_back += 1
