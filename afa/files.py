"""Files that appear whole or not at all, folders that one process at a time writes to, and hashes of files.

A new file is first written to a staging place beside its target, `.writing-HOST-PID-NAME`. The files of a
folder are committed together: their staging place is renamed to `.committed`, and then its content is moved
out. If this process is killed in between, the next process that reads or writes the folder moves it out.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afa import locks
from afa.errors import UserError

WRITING, COMMITTED, LOCK = ".writing-", ".committed", ".afa-lock"
PATIENCE = 20.0  # seconds that a reader waits for a living process to move out what it has committed
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)  # what a file system answers that cannot sync
BLOCK, SLOW = 1 << 20, 3.0  # bytes read at once for a hash; seconds after which hashing is reported
# What a damaged .npz file raises.
DAMAGED = (OSError, ValueError, KeyError, EOFError, AttributeError, NotImplementedError)
DAMAGED += (zipfile.BadZipFile, zlib.error)

_numbers = itertools.count()
_active: set[Path] = set()  # staging places of this process
_hashes: dict[tuple[object, ...], str] = {}
_hashing = [0.0, False]  # seconds spent, whether it was reported


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `path` atomically."""
    temporary = _staging(path.parent, path.name)
    try:
        with _plain_errors(path):
            yield temporary
            _as_others_are(temporary)
            _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _active.discard(temporary)


def given_name(path: Path) -> str:
    """The name of a file or folder as the user gave it: the name of a link, not of its target."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace one file's content whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder to write into; on success everything in it becomes part of `folder`, all at once.

    If anything fails (a full disk, Ctrl-C), or if the process is killed, `folder` is all old or all new.
    last: name of the file that is moved at the end, for programs that read the folder without `settled`
    Raises UserError if `folder` is a file, or if another process writes to it.
    """
    with locked(folder):
        stage = _staging(folder, "files")
        stage.mkdir()
        try:
            with _plain_errors(folder):
                yield stage
                _as_others_are(stage)
                _flush(stage)
            os.replace(stage, folder / COMMITTED)  # from here on the new files are valid
            _move_out(folder, last)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            _active.discard(stage)


def settled(folder: Path) -> Path:
    """Finish what a killed process has committed in a folder; call it before reading. Returns the folder."""
    while _committed(folder):
        with locked(folder, wait=PATIENCE):
            pass
    return folder


def present(folder: Path) -> list[Path]:
    """What lies in a folder besides locks and unfinished files; empty if there is no folder."""
    if not folder.is_dir():
        return []
    return [
        path for path in settled(folder).iterdir() if path.name != LOCK and not path.name.startswith(WRITING)
    ]


def _committed(folder: Path) -> bool:
    """Whether something waits to be moved out; a link in its place is not ours."""
    return (folder / COMMITTED).is_dir() and not (folder / COMMITTED).is_symlink()


def _move_out(folder: Path, last: str = "") -> None:
    """Move committed files to their places. Needs the lock. May be interrupted and done again."""
    ready = folder / COMMITTED
    if not _committed(folder):
        return
    for name in sorted((path.name for path in ready.iterdir()), key=lambda name: (name == last, name)):
        target = folder / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif target.exists() and (ready / name).is_dir():
            target.unlink()
        os.replace(ready / name, target)
    ready.rmdir()


def _staging(folder: Path, name: str) -> Path:
    """A new place to write to; its name says which process writes there."""
    if len(os.fsencode(name)) > 200:  # file systems end at 255
        name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16] + Path(name).suffix[:20]
    path = folder / f"{WRITING}{locks.HOST}-{os.getpid()}-{next(_numbers)}-{name}"
    _active.add(path)
    return path


def _flush(path: Path) -> None:
    """Wait until data is on the disk, so that a power failure cannot keep the rename but lose the data."""
    if os.name == "nt":
        return
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if not file.is_symlink() and file.exists():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in NO_SYNC:
                    raise
            finally:
                os.close(descriptor)


def _as_others_are(stage: Path) -> None:
    """Give a file, or all files of a folder, the usual permissions of new files.

    Some writers (safetensors) make them private.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (stage, *stage.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    """Turn the errors for a full disk of safetensors and torch into an OSError."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or "inline_container" in str(error):
            raise OSError(
                errno.ENOSPC, "No space left on the disk; make room and repeat the command", str(target)
            ) from error
        raise


def read_arrays(path: Path) -> dict[str, Any] | None:
    """All arrays of an .npz file; None if it is not there, or damaged."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except DAMAGED:
        return None


def json_or_none(path: Path) -> Any:
    """The content of a JSON file that a run keeps for itself; None if it is not there, or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def locked(target: Path, *, file: bool = False, wait: float = 0.0, shared: bool = False) -> Iterator[None]:
    """Inside the context, no other process writes to a folder; what killed processes left is removed.

    A process may lock a folder several times. Of several processes that work together (accelerate launch)
    only the first one takes the lock. A folder that the lock made is removed again if it stays empty.
    target: the folder, or with file=True one file
    wait:   seconds that another process may take to let the lock go
    shared: with other processes that share it, each of which writes files of its own; what killed processes
            left stays, since it may be of others that still run
    Raises UserError if it does not, or if nothing can be written there.
    """
    another_rank = os.environ.get("RANK", "0") != "0"  # the first process holds the lock for all
    if another_rank or (lock := _lock_file(target, file)) in locks.held:
        yield
        return
    made = _make_folders(lock.parent, target)
    try:
        locks.acquire(lock, target, wait, shared)
        try:
            if shared:
                pass
            elif file:
                _sweep(target.parent, target.name)
            else:
                _move_out(target)
                _sweep(target)
            yield
        finally:
            locks.release(lock)
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # not empty
                folder.rmdir()


def refuse_busy(target: Path, *, file: bool = False, wait: float = 0.0, shared: bool = False) -> None:
    """Raises UserError if another process writes to a folder or file; arguments as in `locked`.

    What a killed process left there is removed.
    """
    if _lock_file(target, file).exists():
        with locked(target, file=file, wait=wait, shared=shared):
            pass


def _lock_file(target: Path, file: bool) -> Path:
    where = target.absolute()
    where = where.parent.resolve() / where.name if file else where.resolve()
    return where.with_name(f".{where.name}{LOCK}") if file else where / LOCK


def _make_folders(folder: Path, target: Path) -> list[Path]:
    """Make a folder and its parents: -> those that were missing, the outermost first. Raises UserError."""
    if target.is_file() and folder == target.resolve():
        raise UserError(f"{target} is a file; give a folder to write to")
    missing = list(itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents]))[::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise locks.unwritable(target, error) from None
    return missing


def _sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left unfinished: anywhere below a folder, or of the file `name` in it.

    Needs the lock.
    """
    for place, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            path = Path(place) / entry
            if entry.startswith(WRITING):
                if (name is None or entry.endswith(f"-{name}")) and _abandoned(path):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            elif entry in (LOCK, COMMITTED) and name is None and place != str(folder):
                with suppress(UserError), locked(path.parent):  # the folder of a run inside this one
                    pass
        if name is not None:
            return
        folders[:] = [entry for entry in folders if not entry.startswith(WRITING)]


def _abandoned(staging: Path) -> bool:
    """Whether the process that wrote there has ended. The lock keeps out processes of other machines."""
    host, _, rest = staging.name.removeprefix(WRITING).partition("-")
    pid = rest.partition("-")[0]
    if host != locks.HOST or not pid.isdecimal():
        return True
    return staging not in _active if int(pid) == os.getpid() else not locks.alive(int(pid))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_active.clear)  # a forked child writes none of its parent's files


def sha256(path: Path) -> str:
    """The SHA-256 of one file as hexadecimal digits.

    A file is read once in a process unless it changes. If reading takes long, a line on stderr says so.
    """
    fact = path.stat()
    key = (path.resolve(), fact.st_size, fact.st_mtime_ns, fact.st_ino, fact.st_ctime_ns)
    if key in _hashes:
        return _hashes[key]
    total, began = hashlib.sha256(), time.monotonic()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            total.update(block)
            if not _hashing[1] and _hashing[0] + time.monotonic() - began > SLOW:
                _hashing[1] = True
                print(
                    f"afa: computing the sha256 of files, so that a change is noticed; now {path.name}, "
                    f"{fact.st_size / 1e9:.1f} GB",
                    file=sys.stderr,
                )
    _hashing[0] += time.monotonic() - began
    if time.time_ns() - fact.st_ctime_ns > 1e9:  # a younger file may change again within one clock tick
        _hashes[key] = total.hexdigest()
    return total.hexdigest()
