"""Runs Python files of the user; an error in them becomes one sentence with file and line."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from afa.errors import UserError

LONGEST = 400  # letters of an error's own message


class UserFile:
    """A Python file that was run; it may import files beside it.

    path: the file
    flag: the option that named it, for messages
    Raises UserError if it is no Python file, or cannot be run.
    """

    def __init__(self, path: Path, flag: str) -> None:
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"{flag} {path} is no Python file")
        self.path, self.flag = path, flag
        name = f"afa_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[name] = self.module  # dataclasses and pickles look their module up
        beside = str(path.resolve().parent)
        if beside not in sys.path:
            sys.path.append(beside)
        # A folder of the user's gets no __pycache__ from being read.
        kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            spec.loader.exec_module(self.module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{flag} {path} cannot be run: {self._words(error)}") from error
        finally:
            sys.dont_write_bytecode = kept

    def has(self, function: str) -> bool:
        """Whether the file defines a function of that name."""
        return callable(getattr(self.module, function, None))

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the file returns.

        Raises UserError with the error's kind, words, file and line where it fails.
        """
        try:
            return getattr(self.module, function)(*arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{function}() of {self.flag} {self.path} failed: {self._words(error)}"
            ) from error

    def neighbours(self) -> list[Path]:
        """The files beside it that are imported by now: what it returns may depend on them."""
        own = self.path.resolve()
        files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        beside = {Path(file) for file in files if file and str(file).startswith(f"{own.parent}{os.sep}")}
        return sorted(
            file for file in beside if file.parent == own.parent and file != own and file.suffix == ".py"
        )

    def _words(self, error: BaseException) -> str:
        """The error in one line: kind, message, and the last place in the user's own files that it passed."""
        message = " ".join(str(error).split())
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]} …"
        own = {self.path.resolve(), *self.neighbours()}
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() in own
        ]
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        return f"{type(error).__name__}{f': {message}' if message else ''}{place}"
