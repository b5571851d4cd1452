"""Files that appear whole or not at all, hashes of files, and folders that one process at a time writes to.

What is being written lies in a staging place, `.writing-HOST-PID-NAME`, beside its target. A folder's files
are committed together by one rename of the staging place to `.committed`; what is in there is then moved out,
by a later process if this one is killed.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afa.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

WRITING, COMMITTED, LOCK = ".writing-", ".committed", ".afa-lock"
HOST = f"{zlib.crc32(socket.gethostname().encode()) & 0xFFFF:04x}"
NO_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EBADF,
)  # what file systems without locks answer
UNWRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
)
PATIENCE = 20.0  # seconds that a reader waits for a living process to move out what it has committed
BLOCK, SLOW = 1 << 20, 3.0  # bytes read at once for a hash; seconds after which hashing is reported

_numbers = itertools.count()
_active: set[Path] = set()  # staging places of this process
_held: dict[Path, int] = {}  # lock files of this process: file descriptor
_hashes: dict[tuple[object, ...], str] = {}
_hashing = [0.0, False]  # seconds spent, whether it was reported


# ---- whole files ---------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `path` atomically."""
    temporary = _staging(path.parent, path.name)
    try:
        with _plain_errors(path):
            yield temporary
            _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _active.discard(temporary)


def given_name(path: Path) -> str:
    """Return the name of a file or folder as the user gave it: of a link its own name, not its target's."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace one file's content whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder to write into; on success everything in it becomes part of `folder`, all at once.

    last: the file that is moved at the end, for readers that do not know `settled`. If anything fails (a full
    disk, Ctrl-C) or the process is killed, `folder` is as it was before, or all new.
    Raises UserError if `folder` is a file, or another process writes to it.
    """
    with locked(folder):
        stage = _staging(folder, "files")
        stage.mkdir()
        try:
            with _plain_errors(folder):
                yield stage
                _as_others_are(stage)
                _flush(stage)
            os.replace(
                stage, folder / COMMITTED
            )  # before this the old files are valid, after it the new ones are
            _move_out(folder, last)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            _active.discard(stage)


def settled(folder: Path) -> Path:
    """Finish the commit of a killed process in a folder, and return the folder; call it before reading."""
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
    """Move what is committed to its place. Needs the lock. Can be interrupted and done again."""
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
    """A new place to write to, which other processes can tell to be this one's."""
    if len(os.fsencode(name)) > 200:  # file systems end at 255
        name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16] + Path(name).suffix[:20]
    path = folder / f"{WRITING}{HOST}-{os.getpid()}-{next(_numbers)}-{name}"
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
                if error.errno not in (
                    errno.EINVAL,
                    errno.ENOTSUP,
                    errno.EROFS,
                ):  # this kind of file system has no such thing
                    raise
            finally:
                os.close(descriptor)


def _as_others_are(stage: Path) -> None:
    """Give all files the usual permissions of new files; some writers (safetensors) make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.rglob("*"):
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
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ):
        return None


def json_or_none(path: Path) -> Any:
    """What a JSON file holds that a run keeps for itself; None if it is not there, or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# ---- one process at a time -----------------------------------------------------------------------


@contextmanager
def locked(target: Path, *, file: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Inside the context, no other process writes to a folder, and leftovers of killed processes are removed.

    The lock ends with the process. A process may take it several times. Of several processes that work
    together (accelerate launch) only the first one takes it. A folder that is empty afterwards, and was not
    there before, is removed.
    wait: seconds that another process may take to let it go. Raises UserError if it does not, or nothing can
    be written there.
    """
    if _helper() or (lock := _lock_file(target, file)) in _held:
        yield
        return
    made = _make_folders(lock.parent, target)
    try:
        _held[lock] = _acquire(lock, target, time.monotonic() + wait)
        try:
            if file:
                _sweep(target.parent, target.name)
            else:
                _move_out(target)
                _sweep(target)
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(_held.pop(lock))
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # not empty
                folder.rmdir()


def refuse_busy(target: Path, *, file: bool = False, wait: float = 0.0) -> None:
    """Raises UserError if another process writes to a folder or file.

    What a killed one left there is removed. wait: see locked.
    """
    if _lock_file(target, file).exists():
        with locked(target, file=file, wait=wait):
            pass


def _helper() -> bool:
    """Whether this is one of several processes of a run, but not the first, which holds the lock for all."""
    return os.environ.get("RANK", "0") != "0"


def _lock_file(target: Path, file: bool) -> Path:
    where = target.absolute()
    where = where.parent.resolve() / where.name if file else where.resolve()
    return where.with_name(f".{where.name}{LOCK}") if file else where / LOCK


def _make_folders(folder: Path, target: Path) -> list[Path]:
    """-> those that were made, the outermost first. Raises UserError if that cannot be."""
    if target.is_file() and folder == target.resolve():
        raise UserError(f"{target} is a file; give a folder to write to")
    missing = list(itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents]))[::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from None
    return missing


def _acquire(lock: Path, target: Path, end: float) -> int:
    """-> the file descriptor that holds it. end: until when it is tried."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise _unwritable(target, error) from None
        try:
            free = _lock(descriptor)
            if not free and time.monotonic() >= end:
                raise _busy(target, descriptor)
            if not free:
                time.sleep(0.05)
            elif _same(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{HOST} {os.getpid()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended, and removed it, between our opening and our locking


def _same(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Lock an open file: -> whether it was free."""
    try:
        if fcntl is None:
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others may want to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return False
        host, pid = _holder(
            descriptor
        )  # a file system without locks: the process that is named counts while it lives
        return not (host == HOST and pid != os.getpid() and _alive(pid))


def _holder(descriptor: int) -> tuple[str, int]:
    """Host and process of a lock file; ("", 0) if it does not say."""
    text = (
        os.read(descriptor, 64).decode(errors="replace").split()
        if os.lseek(descriptor, 0, os.SEEK_SET) == 0
        else []
    )
    return (text[0], int(text[1])) if len(text) == 2 and text[1].isdecimal() else ("", 0)


def _busy(target: Path, descriptor: int) -> UserError:
    host, pid = _holder(descriptor)
    named = f" (pid {pid}{'' if host == HOST else ' on another machine'})" if pid else ""
    return UserError(
        f"another process{named} is writing to {target}; wait until it has ended, or choose another --output"
    )


def _unwritable(target: Path, error: OSError) -> Exception:
    if error.errno not in UNWRITABLE:
        return error
    return UserError(
        f"nothing can be written to {target} ({error.strerror}: {error.filename}); choose another --output"
    )


def _alive(pid: int) -> bool:
    """Whether a process of this machine still runs; where that cannot be asked, yes."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left unfinished: anywhere below a folder, or of the file `name` in it.

    Needs the lock.
    """
    for place, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            path = Path(place) / entry
            if (
                entry.startswith(WRITING)
                and (name is None or entry.endswith(f"-{name}"))
                and _abandoned(path)
            ):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                    missing_ok=True
                )
            elif (
                entry in (LOCK, COMMITTED) and name is None and place != str(folder)
            ):  # of a run inside this one
                with suppress(UserError), locked(path.parent):
                    pass
        if name is not None:
            return
        folders[:] = [entry for entry in folders if not entry.startswith(WRITING)]


def _abandoned(staging: Path) -> bool:
    """Whether nobody writes there any more. The lock keeps out processes of other machines."""
    host, _, rest = staging.name.removeprefix(WRITING).partition("-")
    pid = rest.partition("-")[0]
    if host != HOST or not pid.isdecimal():
        return True
    return staging not in _active if int(pid) == os.getpid() else not _alive(int(pid))


def _forget() -> None:
    """A forked child holds none of its parent's locks."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _active.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- hashes --------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The hash of one file, read once in a process unless it changes; says so on stderr if it takes long."""
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
                    f"afa: reading the files for their sha256, so that a change is noticed; at {path.name}, "
                    f"{fact.st_size / 1e9:.1f} GB",
                    file=sys.stderr,
                )
    _hashing[0] += time.monotonic() - began
    if (
        time.time_ns() - fact.st_ctime_ns > 1e9
    ):  # a younger file may change again within one tick of the clock
        _hashes[key] = total.hexdigest()
    return total.hexdigest()
