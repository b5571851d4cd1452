"""Write several files so that either all of them appear or none."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afa.errors import UserError


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder to write into; on success what is in it moves to `folder`, the file `last` at the end.

    If anything fails (a full disk, Ctrl-C), `folder` is as it was before. Raises UserError if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to write to")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        with _plain_errors(folder):
            yield stage
        _as_others_are(stage)
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == last)
        for name in names:
            target = folder / name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(stage / name, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `path`, so a reader sees the old or the new, never a part."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        with _plain_errors(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    """Writers of tensors report a full disk in words of their own (SafetensorError, a failed assertion of torch); make it an OSError."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or "inline_container" in str(error):
            raise OSError(errno.ENOSPC, "No space left on the disk; make room and repeat the command", str(target)) from error
        raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace one file's content whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def _as_others_are(stage: Path) -> None:
    """Some writers (safetensors) make files that only their owner may read; give them the permissions of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
