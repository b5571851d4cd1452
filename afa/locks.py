"""A lock file that one process holds at a time, or several that share it.

The lock ends with its process, however that ends.
"""

import errno
import os
import socket
import time
import zlib
from pathlib import Path

from afa.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

HOST = f"{zlib.crc32(socket.gethostname().encode()) & 0xFFFF:04x}"  # this machine, in names and lock files
# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
# Why a place cannot be written to, where the user can choose another one.
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
UNWRITABLE += (errno.ENOSPC, errno.EDQUOT)

held: dict[Path, int] = {}  # lock files of this process: file descriptor


def acquire(lock: Path, target: Path, wait: float, shared: bool = False) -> None:
    """Take a lock.

    lock:   the lock file
    target: what is to be written, for messages
    wait:   seconds that its holder may take to let it go
    shared: with all others that share it. Where a file system has no locks, nothing is locked then
    Raises UserError if the holder does not, or if the lock file cannot be written.
    """
    end = time.monotonic() + wait
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise unwritable(target, error) from None
        try:
            free = _lock(descriptor, shared)
            if not free and time.monotonic() >= end:
                raise _busy(target, descriptor)
            if not free:
                time.sleep(0.05)
            elif _same(descriptor, lock):
                held[lock] = descriptor
                if shared:
                    return
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{HOST} {os.getpid()}".encode())
                return
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder ended, and removed the file, between our opening and our locking


def release(lock: Path) -> None:
    """Let a lock go; the last one that shares it removes its file."""
    descriptor = held.pop(lock)
    if fcntl is None or _lock(descriptor, False):
        lock.unlink(missing_ok=True)
    os.close(descriptor)


def alive(pid: int) -> bool:
    """Whether a process of this machine still runs; True where that cannot be found out."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def unwritable(target: Path, error: OSError) -> Exception:
    """The error for a place that cannot be written to: a UserError if another place would do."""
    if error.errno not in UNWRITABLE:
        return error
    return UserError(
        f"nothing can be written to {target} ({error.strerror}: {error.filename}); choose another --output"
    )


def _lock(descriptor: int, shared: bool) -> bool:
    """Lock an open file, or make a shared lock of it exclusive: -> whether it was free."""
    try:
        if fcntl is None:
            if shared:
                return True
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others may want to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return False
    if shared:
        return True
    # Without locks, the process that is named in the file holds it while it lives.
    host, pid = _holder(descriptor)
    return not (host == HOST and pid != os.getpid() and alive(pid))


def _holder(descriptor: int) -> tuple[str, int]:
    """The machine and the process that a lock file names; ("", 0) if it names none."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 64).decode(errors="replace").split()
    return (text[0], int(text[1])) if len(text) == 2 and text[1].isdecimal() else ("", 0)


def _same(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _busy(target: Path, descriptor: int) -> UserError:
    host, pid = _holder(descriptor)
    named = f" (pid {pid}{'' if host == HOST else ' on another machine'})" if pid else ""
    return UserError(
        f"another process{named} is writing to {target}; wait until it has ended, or choose another --output"
    )


def _forget() -> None:
    """A forked child holds none of its parent's locks."""
    for descriptor in held.values():
        os.close(descriptor)
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
