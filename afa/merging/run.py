"""A merge of checkpoints, from files to a file or folder, key by key: never more than one key's tensors are in memory."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.files import locked, replacing, staged
from afa.merging.folder import copy_surroundings
from afa.merging.layout import Item
from afa.merging.original import to_original
from afa.merging.parts import equal
from afa.merging.plan import Plan, check_output, make_plan
from afa.merging.recipe import hash_sources, metadata, same_parts
from afa.merging.settings import MergeSettings
from afa.merging.sources import Reader
from afa.merging.table import find_merge, merge_key
from afa.merging.writer import write_safetensors


def merge_files(settings: MergeSettings, plan: Plan | None = None) -> dict[str, Any]:
    """Merge and write: -> what was done, as plain data. All or nothing is written. Raises UserError if it cannot be done."""
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
    return plan.facts() | {"same_in_all": once, "sha256": sha256, "seconds": seconds}


class FileMerge:
    """The tensors of a plan's result, made one at a time. once: parts that are taken from the first expert as they are."""

    def __init__(self, plan: Plan, reader: Reader, once: list[str], bar: Any) -> None:
        self.plan, self.reader, self.bar = plan, reader, bar
        self.merged = [part for part in plan.merged_parts if part not in once]
        self.rule = find_merge(plan.settings.method)
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
            for name, items in self.plan.files.items():
                write_safetensors(stage / name, items, self.make, strings)

    @torch.no_grad()
    def make(self, item: Item) -> Tensor:
        """One tensor of the output."""
        self.bar.update()
        if item.spare is not None:
            return self.reader.read(item.spare)
        return to_original([self.value(key) for key in item.keys], item.form)

    def value(self, key: str) -> Tensor:
        """One key's merged value, or the value of the expert it comes from."""
        part = key.partition(".")[0]
        stored = self.plan.origin(part).tensors[key]
        if part not in self.merged or not stored.is_float:
            return self._cast(self.reader.read(stored))
        tensors = [self.reader.read(source.tensors[key]) for source in self.plan.experts]
        base = self.reader.read(self.plan.base.tensors[key]) if self.plan.base else None
        others = [*tensors[1:], *([base] if base is not None else [])]
        if all(equal(tensors[0], other) for other in others):
            return self._cast(tensors[0])
        where = {"key": key, "stage": self.plan.stages[key]}
        return merge_key(self.rule, tensors, base, **where, dtype=self.dtype, **self.plan.options)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor
