"""What the tests of hostile input share: the command line in this process, values of the wrong kind, copies of the embedded models."""

import contextlib
import io
import json
import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.cli.main import main

ASSETS = Path(__file__).parents[2] / "afa" / "demo" / "assets"
EXPERTS = ("curves", "angles", "patterns")
# One value of every kind that a file may hold where another is expected.
WRONG: dict[str, Any] = {
    "null": None, "int": 3, "huge": 10**30, "negative": -7, "float": 0.5, "nan": float("nan"), "inf": float("inf"), "bool": True,
    "list": [1, [2]], "dict": {"a": {"b": 1}}, "empty list": [], "empty dict": {}, "text": "mangled", "empty": "", "nul": "a\0b",
    "long": "x" * 150_000, "path": "../../escape", "markup": "<script>alert(1)</script>", "surrogate": "\ud800",
}  # fmt: skip


@dataclass
class Run:
    """What a command did. code: its exit code, or "traceback"."""

    code: int | str
    out: str
    err: str

    @property
    def refused(self) -> bool:
        """One sentence and exit code 2, which is not about the spelling of the command itself."""
        last = self.err.strip().splitlines()[-1:] or [""]
        return self.code == 2 and last[0].startswith("afa") and "unrecognized arguments" not in self.err and "are required:" not in self.err


def afa(*arguments: object) -> Run:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except Exception:
            traceback.print_exc()
            code = "traceback"
    return Run(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer: a hang is a failure, not a wait."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def downloaded(place: Path, name: str = "downloaded") -> Path:
    """The embedded ensemble and its experts, copied below a folder: -> the ensemble's."""
    for expert in EXPERTS:
        if not (place / expert).exists():
            shutil.copytree(ASSETS / expert, place / expert)
    return Path(shutil.copytree(ASSETS / "ensemble", place / name))


def edit(file: Path, *path: str | int, value: Any) -> None:
    """Put another value at one place of a JSON file."""
    whole = json.loads(file.read_text())
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    file.write_text(json.dumps(whole))
