"""Commands as processes of their own, forked from an interpreter that has imported what they need: an import takes five seconds.

It has never computed anything, so that it has one thread, and what is forked from it cannot wait for threads that it lacks.
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds


def serve() -> None:
    """Fork a process for every line of stdin {"arguments", "out", "err"}: -> its pid, and then its exit code, each on a line."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from afa.cli.main import main

    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    print("ready" if threads == 1 else f"there are {threads} threads", flush=True)
    gc.freeze()  # a collection that looked at what was imported would copy it, in every process that is forked
    while line := sys.stdin.readline():
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
            places = (os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY | os.O_CREAT), (asked["err"], os.O_WRONLY | os.O_CREAT)
            for descriptor, (place, flags) in enumerate(places):
                os.dup2(os.open(place, flags), descriptor)
            sys.exit(main(asked["arguments"]))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@dataclass
class Command:
    """A command that runs. pid: of its process; out, err: files of what it has printed so far."""

    pid: int
    out: Path
    err: Path
    launcher: "Launcher"
    code: int | None = None

    def wait_for(self, text: str, file: Path) -> str:
        """Wait until a text is printed: -> all of it. Fails if the command ends before."""
        late = time.monotonic() + PATIENCE
        while text not in file.read_text():
            self.code = self.launcher.answer(0.01)
            assert self.code is None, f"ended before it printed {text}:\n{self.err.read_text()}"
            assert time.monotonic() < late, f"did not print {text}:\n{self.err.read_text()}"
        return file.read_text()

    def interrupt(self) -> int:
        """A real Ctrl-C: -> the exit code."""
        os.kill(self.pid, signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        """-> the exit code."""
        self.code = self.launcher.answer(PATIENCE)
        assert self.code is not None, f"has not ended:\n{self.err.read_text()}"
        return self.code


class Launcher:
    """Starts one command at a time. printed: what the imports have said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, folder / "imports"
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
        with self.printed.open("w") as printed:
            self.process: Any = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, env=environment, bufsize=0
            )
        assert self._line(PATIENCE) == "ready"

    def _line(self, seconds: float) -> str | None:
        """What the launching process says next; None if it says nothing meanwhile."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return self.process.stdout.readline().decode().strip()

    def answer(self, seconds: float) -> int | None:
        """The exit code of the command; None if it has not ended meanwhile."""
        line = self._line(seconds)
        return None if line is None else int(line)

    @contextmanager
    def started(self, *arguments: object) -> Iterator[Command]:
        """A command that runs, which is killed if it has not ended when its test has."""
        out, err = self.folder / "out", self.folder / "err"
        for file in (out, err):
            file.write_bytes(b"")
        asked = {"arguments": [str(argument) for argument in arguments], "out": str(out), "err": str(err)}
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        command = Command(self.answer(PATIENCE), out, err, self)
        try:
            yield command
        finally:
            if command.code is None:
                os.kill(command.pid, signal.SIGKILL)
                command.wait()

    def close(self) -> None:
        """End the launching process."""
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()


if __name__ == "__main__":
    serve()
