"""Kill every command at its file events, run it again, and compare with the run that was left alone.

    python scripts/kill_at_every_event.py                          # all commands, some events of each: about ten minutes on two cores
    python scripts/kill_at_every_event.py --commands save --most 0 # every event

An event is what changes files below the working folder: opening for writing, rename, remove, mkdir, rmdir, link, truncate. A child is killed
(SIGKILL) just before its event k. Then the same command must come to the same result, and leave nothing unfinished behind.
Prints a line for each command. Ends with 0 if all is well, else 1.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from afa.cli.main import COMMANDS, main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.store import META, RowStore

QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)
MEASURED = {
    "seconds",
    "training_seconds",
    "images_per_second",
    "memory_gb",
    "memory_mb",
    "megabytes",
    "lr_seconds",
    "machine",
}
UNFINISHED = re.compile(
    r"\.writing-|\.committed|\.afa-lock|/\.training/(?!last\.pt$)|weight-average-model|\.tmp"
)
SCORER = """
def score(images, captions):
    return {"light": images.mean((1, 2, 3)) / 255}

def features(images):
    return images[:, ::16, ::16].reshape(len(images), -1) / 255.0
"""
OUT = "out"  # every command writes there, in a working folder of its own


def commands(inputs: Path) -> dict[str, Callable[[], int]]:
    """What is tried, by name: each writes to OUT in the current folder, and returns its exit code."""
    curves, angles = (str(EXPERTS[name]) for name in ("curves", "angles"))
    training = [
        *(
            "--data",
            str(inputs / "data"),
            "--steps",
            "3",
            "--save-every",
            "1",
            "--evaluate-every",
            "2",
            "--batch-size",
            "2",
        ),
        *("--held-out", "2", "--device", "cpu", "--cache", "cache"),
    ]
    distilling = [
        *("--data", str(inputs / "data"), "--steps", "2", "--evaluate-every", "1", "--save-every", "1"),
        *("--batch-size", "2", "--held-out", "1", "--trajectory-steps", "2", "--recombine", "0"),
        *("--student", "curves", "--device", "cpu"),
    ]
    drawing = ["--prompts", str(inputs / "prompts.txt"), "--steps", "1", "--device", "cpu"]
    lines: dict[str, list[str]] = {
        "train": [
            "train",
            "--experts",
            curves,
            angles,
            *training,
            "--hidden",
            "8",
            "--heads",
            "2",
            "--depth",
            "0",
            "--placement",
            "out",
        ],
        "finetune": ["finetune", curves, *training, "--rank", "1"],
        "generate": ["generate", str(ENSEMBLE), *drawing, "--weights", "--batch-size", "1"],
        "generate in shards": [
            *("generate", curves, *drawing, "--batch-size", "1", "--pack", "tar", "--pack-size", "1"),
        ],
        "evaluate": [
            *(
                "evaluate",
                "--ensemble",
                str(ENSEMBLE),
                "--protocol",
                str(inputs / "prompts.txt"),
                "--scorer",
                str(inputs / "scorer.py"),
            ),
            *(
                "--methods",
                "single",
                "afa",
                "magicfusion",
                "--train-data",
                str(inputs / "data"),
                "--tuning",
                "2",
                "--steps",
                "1",
            ),
            *("--guidance", "3", "--device", "cpu", "--resamples", "100", "--batch-size", "1"),
        ],
        "merge to folder": ["merge", "--experts", curves, angles],
        "merge to file": ["merge", "--experts", curves, angles],
        "distill": ["distill", str(ENSEMBLE), *distilling],
        "distill to file": ["distill", str(ENSEMBLE), *distilling],
        "extract": ["extract", curves, "--base", angles, "--rank", "1"],
        "extract to file": ["extract", curves, "--base", angles, "--rank", "1"],
        "search": [
            *(
                "search",
                "--experts",
                curves,
                angles,
                *drawing,
                "--images",
                "2",
                "--scorer",
                str(inputs / "scorer.py"),
            ),
            *("--search", "coordinate", "--line", "binary", "--grouping", "2", "--passes", "1"),
        ],
        "screen": [
            "screen",
            curves,
            angles,
            "--data",
            str(inputs / "data"),
            "--images",
            "3",
            "--draws",
            "2",
            "--device",
            "cpu",
        ],
        "push to folder": ["push", str(ENSEMBLE), "--bundle"],
        "explain": [
            *("explain", str(ENSEMBLE), *drawing[:2], "--steps", "2", "--device", "cpu"),
            *("--word-steps", "1", "--counterfactuals", "off", "skipped", "--guidance", "3"),
        ],
    }
    found: dict[str, Callable[[], int]] = {}
    for title, line in lines.items():
        output = f"{OUT}.safetensors" if title.endswith("to file") else OUT
        found[title] = lambda line=line, output=output: main([*line, "--output", output])
    return found | {"save": save, "comfyui": lambda: main(["comfyui", "--install", OUT])}


def save() -> int:
    """An ensemble over another one, which `prepare` put there."""
    from afa.ensemble import Ensemble

    changed = Ensemble.load(ENSEMBLE)
    for parameter in changed.aggregators.parameters():
        parameter.data.fill_(0.25)
    changed.save(OUT)
    return 0


def prepare(title: str) -> None:
    """What must lie in the working folder before a command runs."""
    if title == "save":
        from afa.ensemble import Ensemble

        Ensemble.load(ENSEMBLE).save(OUT)
    if title == "comfyui":
        for name in ("comfy", "custom_nodes"):
            Path(OUT, name).mkdir(parents=True)
        Path(OUT, "main.py").touch()


def check_left(title: str) -> str | None:
    """What is wrong with what a killed command has left, before it is run again."""
    if title != "save":
        return None
    from afa.ensemble import Ensemble

    values = {
        float(parameter.detach().flatten()[0]) for parameter in Ensemble.load(OUT).aggregators.parameters()
    }
    old = {
        float(parameter.detach().flatten()[0])
        for parameter in Ensemble.load(ENSEMBLE).aggregators.parameters()
    }
    return None if values in (old, {0.25}) else "neither the old nor the new ensemble"


# ---- children ---------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], int], place: Path, log: Path, at: int = 0) -> tuple[int, int]:
    """Run something in a forked process with `place` as its folder, killed before event `at`: -> exit status (-9: killed), events counted.

    A process that is forked has everything imported already.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as stream:
            events = stream.read()
        status = os.waitpid(child, 0)[1]
        return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), int(events or 0)
    code, counted = 99, [0]
    try:
        os.close(reading)
        os.chdir(place)
        with log.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # after the bar of a killed one
            stream.flush()
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.addaudithook(lambda event, details: _count(event, details, str(place), counted, at))
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(writing, str(counted[0]).encode())
        os._exit(code)


def _count(event: str, details: tuple[Any, ...], place: str, counted: list[int], at: int) -> None:
    """Count an event below a folder; kill the process at the one that was asked for."""
    if event == "open":
        mode, flags = details[1] or "", details[2] or 0
        changing = bool(set(mode) & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        changing = event in CHANGES
    if not changing or not any(_below(path, place, details) for path in details[:2]):
        return
    counted[0] += 1
    if counted[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)


def _below(path: Any, place: str, details: tuple[Any, ...]) -> bool:
    if not isinstance(path, str | os.PathLike):
        return False
    folder = next(
        (detail for detail in details[1:] if isinstance(detail, int) and detail > 2), None
    )  # remove(name, dir_fd=…)
    text = os.fspath(path)
    if folder is not None and not text.startswith("/") and Path(f"/proc/self/fd/{folder}").exists():
        text = str(Path(os.readlink(f"/proc/self/fd/{folder}")) / text)  # noqa: PTH115
    return os.path.abspath(text).startswith(place)  # noqa: PTH100


# ---- comparison -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder by path, without what is measured: times, memory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.startswith("cache/"):  # a cache may hold more than is needed, in any order
            continue
        if (path.parent / META).exists():  # which files rows lie in depends on when a run was killed
            if path.name == META:
                found[name] = rows(path.parent)
        else:
            found[name] = content(path)
    return found


def rows(folder: Path) -> dict[str, bytes]:
    """What a store of rows keeps, by key."""
    store = RowStore.existing(folder)
    assert store is not None
    keys = {key for file in folder.glob("*.keys") for key in file.read_text().split()}
    return {key: store.read([key]).numpy().tobytes() for key in sorted(keys) if key in store}


def content(path: Path) -> Any:
    """One file's."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            said = image.info.get("afa")
            return (
                image.size,
                np.asarray(image.convert("RGB")).tobytes(),
                said and unmeasured(json.loads(said)),
            )
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        if path.name == "afa.json":  # safetensors writes its metadata in any order
            own = hashlib.sha256((path.parent / "aggregators.safetensors").read_bytes()).hexdigest()
            found["aggregator"]["sha256"] = found["aggregator"]["sha256"] == own
        return unmeasured(found)
    if path.suffix == ".jsonl":
        return [unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix in (".html", ".md"):
        return re.sub(r"[\d.,]+", "#", path.read_text())
    if path.suffix == ".pt":
        return unmeasured(_plain(torch.load(path, weights_only=True)))
    return path.read_bytes()


def _plain(value: Any) -> Any:
    """Return a state with its tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def unmeasured(value: Any) -> Any:
    """JSON without what differs from run to run; keys in any order."""
    if isinstance(value, dict):
        return {name: unmeasured(one) for name, one in value.items() if name not in MEASURED}
    return [unmeasured(one) for one in value] if isinstance(value, list) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files that are not alike."""
    return sorted(
        name
        for name in {*one, *other}
        if one.get(name) != other.get(name) or (name in one) != (name in other)
    )


# ---- the trial --------------------------------------------------------------------------------------------------------


class Trial:
    """One command: left alone once, then killed at its events, and run again each time."""

    def __init__(self, title: str, work: Callable[[], int], home: Path) -> None:
        self.title, self.work, self.home = title, work, home / title.replace(" ", "-")
        self.faults: list[str] = []
        self.kills = 0
        place = self._place("alone")
        began = time.monotonic()
        code, self.events = in_child(work, place, self._log("alone"))
        self.seconds = time.monotonic() - began
        self.alone = contents(place)
        if code != 0:
            self.faults.append(f"left alone: exit {code}: {self._last('alone')}")
        self._unfinished("left alone", place)

    def kill(self, at: int) -> None:
        """Kill it before event `at`, run it again, and note what is wrong."""
        name = f"at-{at}"
        place, log = self._place(name), self._log(name)
        code, _ = in_child(self.work, place, log, at)
        if code != -signal.SIGKILL:
            return  # it had fewer events this time
        self.kills += 1
        left, _ = in_child(lambda: _complain(check_left(self.title)), place, log)
        if left:
            self.faults.append(f"event {at}: what is left: {self._last(name)}")
        code, _ = in_child(self.work, place, log)
        unlike = differences(self.alone, contents(place))
        there = code == 2 and "exists already" in self._last(
            name
        )  # a merge that was complete when it was killed
        if code != 0 and not (there and not unlike):
            self.faults.append(f"event {at}: exit {code}: {self._last(name)}")
        if unlike:
            self.faults.append(f"event {at}: not as the run left alone: {', '.join(unlike[:4])}")
        self._unfinished(f"event {at}", place)
        if not any(fault.startswith(f"event {at}:") for fault in self.faults):
            shutil.rmtree(place)

    def line(self) -> str:
        if not self.events or not self.kills:
            return "\n".join(
                [
                    f"{self.title:16} {self.events:4d} events, none killed",
                    *(f"    {fault}" for fault in self.faults),
                ]
            )
        unequal = len({fault.partition(":")[0] for fault in self.faults if "leftover" not in fault})
        leftovers = sum("leftover" in fault for fault in self.faults)
        facts = f"{self.events:4d} events  {self.kills:4d} kills  {self.kills - unequal:4d} equal  {leftovers:4d} with leftovers"
        return "\n".join([f"{self.title:16} {facts}", *(f"    {fault}" for fault in self.faults[:6])])

    def _place(self, name: str) -> Path:
        place = self.home / name
        place.mkdir(parents=True)
        code, _ = in_child(lambda: prepare(self.title) or 0, place, self._log(name))
        assert code == 0, self._last(name)
        return place

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def _last(self, name: str) -> str:
        lines = [line for line in re.split(r"[\r\n]+", self._log(name).read_text()) if line.strip()]
        spoken = [line[line.find("afa: ") :] for line in lines if "afa: " in line or "%|" not in line]
        return spoken[-1][:300] if spoken else ""

    def _unfinished(self, when: str, place: Path) -> None:
        left = [
            path.relative_to(place).as_posix()
            for path in place.rglob("*")
            if UNFINISHED.search(f"/{path.relative_to(place).as_posix()}")
        ]
        if left:
            self.faults.append(f"{when}: leftovers: {', '.join(left[:3])}")


def _complain(sentence: str | None) -> int:
    if sentence:
        print(sentence)
    return int(sentence is not None)


def warm_up() -> None:
    """Import once what every child would import for itself, computing nothing in this process."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    _ = (
        diffusers.StableDiffusionPipeline,
        diffusers.UNet2DConditionModel,
        diffusers.AutoencoderKL,
        diffusers.DDIMScheduler,
    )
    _ = transformers.CLIPTextModel, transformers.CLIPTokenizerFast
    import afa.demo.draw
    import afa.evaluation.report.files
    import afa.evaluation.run
    import afa.explanation.run
    import afa.generation.run
    import afa.merging.engine
    import afa.merging.search
    import afa.screening.report
    import afa.screening.run
    import afa.training.finetune
    import afa.training.run  # noqa: F401

    for module in COMMANDS.values():
        importlib.import_module(module)


def make_inputs(inputs: Path) -> None:
    """Draw what the commands are given."""
    inputs.mkdir(parents=True)

    def make() -> int:
        from afa.demo.draw import draw

        draw(inputs / "data", "mixed", 8, 0)
        captions = [
            json.loads(line)["text"] for line in (inputs / "data" / "metadata.jsonl").read_text().splitlines()
        ]
        (inputs / "prompts.txt").write_text("\n".join(captions[:2]) + "\n")
        (inputs / "scorer.py").write_text(SCORER)
        return 0

    assert in_child(make, inputs, inputs.parent / "inputs.log")[0] == 0, (
        inputs.parent / "inputs.log"
    ).read_text()


def chosen(events: int, every: int, most: int) -> list[int]:
    """Which events to kill at: every so many, and of these at most so many, spread over the run; the first and the last among them."""
    found = list(range(1, events + 1, every))
    if most and len(found) > most:
        found = sorted({found[round(place * (len(found) - 1) / max(1, most - 1))] for place in range(most)})
    return found


def run(names: list[str], every: int, most: int, home: Path, workers: int) -> bool:
    """Try these commands: -> whether all is well."""
    warm_up()
    make_inputs(home / "inputs")
    known, well = commands(home / "inputs"), True
    for title in names:
        trial = Trial(title, known[title], home)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(trial.kill, chosen(trial.events, every, most) if not trial.faults else []))
        print(trial.line(), flush=True)
        well = well and not trial.faults
    return well


def cli() -> int:
    titles = list(commands(Path()))
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--commands", nargs="+", choices=titles, default=titles, help="which (default: all)")
    flags.add_argument("--every", type=int, default=1, help="kill at only every so many events")
    flags.add_argument(
        "--most", type=int, default=16, help="at most so many events of a command, spread over it; 0: all"
    )
    flags.add_argument("--workers", type=int, default=2, help="how many are tried at once")
    flags.add_argument("--keep", action="store_true", help="keep what was written, for looking at a fault")
    given = flags.parse_args()
    home = Path(tempfile.mkdtemp(prefix="afa-kill-"))
    try:
        return 0 if run(given.commands, given.every, given.most, home, given.workers) else 1
    finally:
        if given.keep:
            print(f"kept in {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(cli())
