"""The kinds of data sources, chosen by what --data names."""

import importlib
from collections.abc import Callable
from pathlib import Path

from afa.data.hub import from_hub, from_parquet
from afa.data.shards import expand, from_shards
from afa.data.sources import (
    METADATA,
    TABLE,
    Columns,
    ImageSource,
    LeftOutError,
    find_file,
    from_csv,
    from_jsonl,
    from_pairs,
    is_hidden,
    roots_of,
)
from afa.errors import UserError
from afa.experts.spec import HUB_ID

# ending of a file, or of the files in a folder -> how they are read
FORMS: dict[str, Callable[[str, list[Path], Columns], ImageSource]] = {
    ".jsonl": lambda place, files, columns: from_jsonl(files[0], columns),
    ".parquet": from_parquet,
    ".tar": from_shards,
}
# what a place begins with -> module:function(place) that draws its images
DRAWN = {"scenes:": "afa.demo.data:from_scenes"}
WANTED = (
    f"a folder with {METADATA} or with a .txt beside every image, a .jsonl, .parquet files, .tar shards, "
    "or a data set of the hub"
)


def open_source(place: str, columns: Columns | None = None, limit: int | None = None) -> ImageSource:
    """List the images at a place.

    limit: list only the first so many; None: all
    Raises UserError if there are no images to train on.
    """
    try:
        source = _open(place, columns or Columns(), limit)
    except OSError as error:  # no right to read it, a disk that fails, a name that is too long
        raise UserError(f"--data {place[:200]} cannot be read: {error.strerror or error}") from None
    if limit is not None:
        source = ImageSource(source.origin, source.samples[:limit], source.skipped)
    if not source.samples:
        raise UserError(f"--data {place} has no image to train on: {source.summary()}")
    return source


def _open(place: str, columns: Columns, limit: int | None) -> ImageSource:
    path = Path(place)
    for prefix, drawer in DRAWN.items():
        if place.startswith(prefix):
            module, _, function = drawer.partition(":")
            source: ImageSource = getattr(importlib.import_module(module), function)(place)
            return source
    if path.is_dir():
        return _from_directory(path, columns)
    files = expand(place)
    missing = [file for file in files if not file.is_file()]
    form = FORMS.get(path.suffix)
    if form is not None and files and not missing:
        return form(place, files, columns)
    if form is None and not path.exists() and HUB_ID.fullmatch(place.partition("@")[0]):
        return from_hub(place, columns, limit)
    if form is not None:
        raise UserError(f"--data {place}: there is no file {missing[0] if missing else place}")
    raise UserError(
        f"--data {place} is {'of no known form' if path.exists() else 'not there'}; give {WANTED}"
    )


def _from_directory(folder: Path, columns: Columns) -> ImageSource:
    """Read a list of images, else parquet files, else shards, else images with captions beside them."""
    for name, form in ((METADATA, from_jsonl), (TABLE, from_csv)):
        if (folder / name).is_file():
            return form(folder / name, columns)
    for ending in (".parquet", ".tar"):
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob(f"*{ending}"))]
        files = []
        for name in (name for name in names if not is_hidden(name)):
            try:
                files.append(find_file(name, folder, roots_of(folder, columns)))
            except LeftOutError as reason:
                raise UserError(f"--data {folder}: {name} is {reason}") from None
        if files:
            return FORMS[ending](str(folder), files, columns)
    source = from_pairs(folder, columns)
    if source is None:
        raise UserError(
            f"{folder} has no {METADATA}; write one with a line "
            '{"file_name": "a.png", "text": "caption"} per image, '
            "or put a .txt beside every image"
        )
    return source
