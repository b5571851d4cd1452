"""Mutate every kind of file that afa reads, run the cheapest command that reads it, and count what must not happen.

    python scripts/fuzz.py --minutes 3 [--seed 0]

Counted are tracebacks, hangs (more than 20 s) and silent acceptance: exit 0 although a key of a file of ours had a value of
another kind. Inputs depend on the seed and on nothing else. Exit code 1 if anything was counted.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
    }
)

ASSETS = ROOT / "afa" / "demo" / "assets"
HANG = 20  # seconds
VALUES = (
    *(
        None,
        3,
        -7,
        10**30,
        0.5,
        float("nan"),
        True,
        "mangled",
        "",
        "a\0b",
        "x" * 150_000,
        "../../escape",
        "<script>alert(1)</script>",
    ),
    *([], [1, [2]], {}, {"a": {"b": 1}}, "\ud800"),
)
FREE = (
    "training.settings.data",
    "training.left_out",
    "protocol",
    "versions",
    "experts",
)  # anything, or told apart by no type
Mutation = Callable[
    [random.Random, bytes], tuple[bytes, str, bool]
]  # -> content, what was done, whether it must be refused


@dataclass(frozen=True)
class Target:
    """A file, how it is mutated, and the command that reads it; paths are relative to the folder of one input."""

    name: str
    file: str
    mutate: Mutation
    command: tuple[str, ...]


# ---- mutations --------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    if path:
        yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """-> what stood there before."""
    for step in path[:-1]:
        tree = tree[step]
    before, tree[path[-1]] = tree[path[-1]], value
    return before


def another_kind(before: Any, after: Any) -> bool:
    """Whether a value is surely of another kind than the one it replaces; null may be right in either place."""
    if before is None or after is None:
        return False
    if isinstance(before, float):
        return isinstance(after, bool) or not isinstance(after, (int, float))
    return type(before) is not type(after)


def json_keys(strict: bool) -> Mutation:
    """One key of a JSON file takes a value of any kind. strict: values of another kind must be refused."""

    def mutate(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
        tree = json.loads(data)
        path, value = rng.choice(list(places(tree))), rng.choice(VALUES)
        before = put(tree, path, value)
        key = ".".join(map(str, path))
        wrong = strict and another_kind(before, value) and not key.startswith(FREE)
        return json.dumps(tree).encode(), f"{key} = {json.dumps(value)[:60]}", wrong

    return mutate


def json_lines(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    content, what, _ = json_keys(False)(rng, lines[place].encode())
    lines[place] = content.decode()
    return "\n".join(lines).encode(), f"line {place + 1}: {what}", False


def toml_keys(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
    lines = [line for line in data.decode().splitlines() if "=" in line]
    place = rng.randrange(len(lines))
    key = lines[place].partition("=")[0].strip()
    value, wrong = rng.choice(
        [
            ("true", True),
            ("nan", True),
            ("[1, [2]]", True),
            ("{a = 1}", True),
            ('"a\\u0000b"', True),
            ("1979-05-27", True),
            (str(10**30), True),
            ("", True),
        ]
    )
    lines[place] = f"{key} = {value}"
    return "\n".join(lines).encode(), lines[place], wrong


def header(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
    """One entry of a safetensors header."""
    (length,) = struct.unpack("<Q", data[:8])
    content, what, _ = json_keys(False)(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(content)) + content + data[8 + length :], what, False


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
    """Bytes are changed, lost, or doubled."""
    place, kind = rng.randrange(len(data)), rng.choice(["cut", "byte", "doubled", "zeros"])
    changed = {
        "cut": data[:place],
        "byte": data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        "doubled": data[:place] + data[place // 2 :],
        "zeros": data[:place] + bytes(64) + data[place + 64 :],
    }
    return changed[kind], f"{kind} at {place}", False


# ---- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """One good file of every kind."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    for name in ("curves", "angles", "patterns", "ensemble"):
        shutil.copytree(ASSETS / name, folder / name)
    data = folder / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(data / f"{index}.png")
    (data / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{index}.png", "text": "a ring"}) + "\n" for index in range(8))
    )
    with tarfile.open(folder / "data.tar", "w") as shard:
        for index in range(8):
            shard.add(data / f"{index}.png", f"{index}.png")
            info = tarfile.TarInfo(f"{index}.txt")
            info.size = 6
            shard.addfile(info, io.BytesIO(b"a ring"))
    (folder / "recipe.toml").write_text(
        "steps = 1\nlr = 0.001\nheld-out = 2\nbatch-size = 2\nema = 0.5\nhidden = 8\nheads = 2\n"
    )
    (folder / "prompts.jsonl").write_text('{"text": "a ring"}\n{"text": "a square"}\n')
    down = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight"
    lora = {down: torch.ones(2, 96), down.replace("lora_A", "lora_B"): torch.ones(96, 2)}
    save_file(lora, folder / "lora.safetensors")
    items = [{"prompt": index, "caption": f"a ring {index}", "seed": index} for index in range(4)]
    runs = [
        {
            "seed": 0,
            "images": "",
            "scores": {"clip_t": [0.1, 0.2, 0.3, 0.4]},
            "sets": {},
            "seconds": [1.0] * 4,
            "memory_mb": 1.5,
        }
    ]
    methods = [
        {"name": name, "group": group, "title": name, "runs": runs, "axes": {}, "of": "", "trained_parameters": 0, "training_steps": 0,
         "training_seconds": [], "note": ""} for name, group in (("single:curves", "expert"), ("afa", "ours"))
    ]  # fmt: skip
    note = {"kind": "image", "higher_is_better": True, "source": "x", "primary": True}
    whole = {
        "format": 1,
        "protocol": {"name": "p", "prompts": 4, "images": 4, "steps": 1},
        "items": items,
        "metrics": {"clip_t": note},
    }
    whole |= {"methods": methods, "errors": [], "experts": [], "versions": {"afa": "0"}, "machine": "cpu"}
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text(json.dumps(whole))


TRAIN = (
    "train",
    "--experts",
    "curves",
    "angles",
    "--output",
    "out",
    "--dry-run",
    "--device",
    "cpu",
    "--placement",
    "out",
)
SMALL = ("--hidden", "8", "--heads", "2", "--held-out", "2", "--batch-size", "2", "--steps", "1")
DRAW = ("--prompt", "a ring", "--steps", "1", "--device", "cpu", "--output", "out")
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
INSPECT = ("inspect", "curves", "angles")
TARGETS = (
    Target("manifest, inspect", "ensemble/afa.json", json_keys(True), ("inspect", "ensemble")),
    Target("manifest, generate", "ensemble/afa.json", json_keys(True), ("generate", "ensemble", *DRAW)),
    Target("manifest, damaged", "ensemble/afa.json", damaged, ("inspect", "ensemble")),
    Target(
        "results, report",
        "results/results.json",
        json_keys(True),
        ("report", "results", "--output", "page.html"),
    ),
    Target("recipe, train", "recipe.toml", toml_keys, (*TRAIN, "--recipe", "recipe.toml", "--data", "data")),
    Target(
        "aggregators' header", "ensemble/aggregators.safetensors", header, ("generate", "ensemble", *DRAW)
    ),
    Target("denoiser's header", f"curves/{UNET}", header, INSPECT),
    Target("text encoder's header", f"curves/{TEXT}", header, INSPECT),
    Target("VAE's header", f"curves/{VAE}", header, ("generate", "curves", *DRAW)),
    Target("LoRA's header", "lora.safetensors", header, ("generate", "curves+lora.safetensors", *DRAW)),
    Target("model_index.json", "curves/model_index.json", json_keys(False), INSPECT),
    Target(
        "model_index.json, generate",
        "curves/model_index.json",
        json_keys(False),
        ("generate", "curves", *DRAW),
    ),
    Target("unet/config.json", "curves/unet/config.json", json_keys(False), INSPECT),
    Target("scheduler_config.json", "curves/scheduler/scheduler_config.json", json_keys(False), INSPECT),
    Target("text_encoder/config.json", "curves/text_encoder/config.json", json_keys(False), INSPECT),
    Target("vae/config.json", "curves/vae/config.json", json_keys(False), ("generate", "curves", *DRAW)),
    Target("metadata.jsonl", "data/metadata.jsonl", json_lines, (*TRAIN, *SMALL, "--data", "data")),
    Target("picture", "data/3.png", damaged, (*TRAIN, *SMALL, "--data", "data")),
    Target("tar shard", "data.tar", damaged, (*TRAIN, *SMALL, "--data", "data.tar")),
    Target(
        "prompts",
        "prompts.jsonl",
        json_lines,
        ("generate", "curves", "--prompts", "prompts.jsonl", *DRAW[2:]),
    ),
)


# ---- running ----------------------------------------------------------------------------------------------------------


class TookTooLong(BaseException):
    """Not an Exception, so that no command takes it for a failure of its own."""


def alarm(*_: object) -> None:
    raise TookTooLong


def run(command: tuple[str, ...], limit: int = HANG) -> tuple[int | str, str]:
    """A command in this process: -> its exit code, "traceback" or "hang", and what it said."""
    from afa.cli.main import main

    said = io.StringIO()
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code: int | str = main(list(command))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except TookTooLong:
        code = "hang"
    except Exception:
        code = "traceback"
        said.write(traceback.format_exc())
    finally:
        signal.alarm(0)
    return "traceback" if "Traceback (most recent call last)" in said.getvalue() else code, said.getvalue()


def main() -> int:
    """Until the time is over: the targets in turn, so that each is tried as often as the others."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, help="only the input of this number, with all that it says")
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="afa-fuzz-"))
    tried: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    try:
        make_inputs(home)
        os.chdir(home)
        for command in dict.fromkeys(
            target.command for target in TARGETS
        ):  # imports what is imported late, too
            code, said = run(command, 300)
            clear(home)
            if code != 0:
                print(
                    f"good input is not taken, so nothing can be learnt of bad input: afa {' '.join(command)} ({code})\n{said}"
                )
                return 1
        end, number = time.monotonic() + 60 * asked.minutes, asked.input or 0
        while time.monotonic() < end and (asked.input is None or number == asked.input):
            target = TARGETS[number % len(TARGETS)]
            outcome, what, said = try_once(home, target, random.Random(f"{asked.seed} {number}"))
            tried[target.name, outcome] += 1
            if outcome not in ("done", "refused"):
                last = (said.strip().splitlines() or [""])[-1][:200]
                faults.append(
                    f"{outcome}: {target.file}: {what}\n    afa {' '.join(target.command)}\n    {last}\n"
                    f"    again: python scripts/fuzz.py --seed {asked.seed} --input {number}"
                )
            if asked.input is not None:
                print(said)
            number += 1
    finally:
        os.chdir(ROOT)
        shutil.rmtree(home, ignore_errors=True)
    outcomes = ("done", "refused", "traceback", "hang", "taken")
    print(f"{'':28}" + "".join(f"{outcome:>11}" for outcome in outcomes))
    for target in TARGETS:
        print(f"{target.name:28}" + "".join(f"{tried[target.name, outcome]:11}" for outcome in outcomes))
    print(
        f"\n{number - (asked.input or 0)} inputs, {len(faults)} faults"
        + "".join(f"\n\n{fault}" for fault in faults[:10])
    )
    return 1 if faults else 0


def clear(home: Path) -> None:
    """Remove what a command has written."""
    for left in ("out", "page.html", "page.md", "page.csv"):
        path = home / left
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def try_once(home: Path, target: Target, rng: random.Random) -> tuple[str, str, str]:
    """Mutate, run, restore: -> done, refused, traceback, hang or taken (silently); what was done; what was said."""
    file = home / target.file
    good = file.read_bytes()
    content, what, must_be_refused = target.mutate(rng, good)
    file.write_bytes(content)
    try:
        code, said = run(target.command)
    finally:
        file.write_bytes(good)
        clear(home)
    if isinstance(code, str):
        return code, what, said
    return ("taken" if must_be_refused else "done") if code == 0 else "refused", what, said


if __name__ == "__main__":
    sys.exit(main())
