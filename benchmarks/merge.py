"""What a merge of files costs: peak memory over the program's own, against the size of one model, for 2, 3 and 5 experts.

    python benchmarks/merge.py
    python benchmarks/merge.py --config sdxl --method ties --experts 2 4

Files of a real architecture's names and shapes in half precision, sparse on the disk: every tensor begins with a few
numbers of its own and is zero otherwise, which costs a merge as much as any content. Each merge runs in a process of its
own; its peak is the system's count of resident memory, mapped files included, less what it held before the merge began.
Target: at most one model, whatever the number of experts.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from afa.cli.flags import add_flags, read_flags
from afa.experts.shipped import KNOWN_CONFIGS
from afa.merging.registry import MERGES, find_merge
from afa.merging.settings import MergeSettings
from afa.settings import option

NUMBERS = 8  # at the beginning of every tensor


@dataclass(frozen=True)
class Options:
    """One measurement, field by field a flag."""

    config: str = option("sd15", help="architecture of the files", choices=list(KNOWN_CONFIGS))
    method: str = option("weighted", help="how to merge", choices=list(MERGES))
    experts: list[int] = option([2, 3, 5], help="how many experts, one merge each")
    folder: str | None = option(
        None, help="where the files are written for the time being (default: the system's)"
    )
    json: bool = option(False, help="print JSON")


def write_sparse(file: Path, config: str, seed: int) -> int:
    """A checkpoint of original layout in float16: -> its size in bytes."""
    from afa.experts.description import describe_config
    from afa.experts.headers import current_name
    from afa.experts.transformer_places import names_by_key, shape_to_original
    from afa.merging.single_file import original_places

    header, end, parts = {}, 0, describe_config("bench", config).parts
    for part, model in parts.items():
        shapes = {current_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        opened = part == "text_encoder_2" or (part == "text_encoder" and config.startswith("sd2"))
        xl = "text_encoder_2" in parts
        places = original_places(part, shapes, parts[part], xl=xl, open_clip=opened)
        for key, names in names_by_key(places).items():
            shape = shape_to_original([shapes[name] for name in names], places[names[0]].form)
            header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
            end += 2 * prod(shape)
    text = json.dumps(header).encode()
    draw = np.random.default_rng(seed)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
        for entry in header.values():
            stream.seek(8 + len(text) + entry["data_offsets"][0])
            stream.write(draw.normal(size=min(NUMBERS, prod(entry["shape"]))).astype(np.float16).tobytes())
    return end


def measure(files: list[str], output: str, method: str) -> dict[str, float]:
    """One merge in this process: -> its peak over what was held before, and its seconds."""
    from afa.merging.engine import merge_files
    from afa.merging.plan import make_plan

    *experts, base = files
    based = {"base": base} if find_merge(method).needs("base") else {}
    weights = {"weights": ["FLAT_50"]} if find_merge(method).by_stage else {}
    settings = MergeSettings(experts, output, method=method, **based, **weights)
    plan = make_plan(settings)
    held, began = resident(), time.perf_counter()
    merge_files(settings, plan)
    return {"peak": _peak() - held, "held": held, "seconds": time.perf_counter() - began}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    return (
        int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if sys.platform == "linux"
        else _peak()
    )


def main() -> None:
    """Write the files, merge them in processes of their own, print peaks and ratios."""
    if len(sys.argv) > 1 and sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[4:], sys.argv[2], sys.argv[3])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Options)
    options: Options = read_flags(Options, parser.parse_args())
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = [Path(folder) / f"expert{place}.safetensors" for place in range(max(options.experts) + 1)]
        sizes = [write_sparse(file, options.config, place) for place, file in enumerate(files)]
        for count in options.experts:
            output = Path(folder) / "merged.safetensors"
            command = [
                sys.executable,
                __file__,
                "--measure",
                str(output),
                options.method,
                *map(str, [*files[:count], files[-1]]),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            output.unlink()
            results.append({"experts": count, "model": sizes[0], **json.loads(done.stdout)})
            results[-1]["ratio"] = results[-1]["peak"] / sizes[0]
            if not options.json:
                print(_line(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))


def _line(result: dict[str, float]) -> str:
    peak, size = result["peak"] / 1e9, result["model"] / 1e9
    own = f"peak {peak:.2f} GB over the program's own, {result['ratio']:.2f} of one model"
    return f"{result['experts']} experts of {size:.2f} GB: {own}; {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
