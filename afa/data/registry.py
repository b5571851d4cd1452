"""The kinds of data sources, chosen by what --data names."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from afa.data.hub import from_hub, from_parquet
from afa.data.shards import expand, from_shards
from afa.data.sources import (
    METADATA,
    TABLE,
    Columns,
    ImageSource,
    LeftOutError,
    Sample,
    Skipped,
    find_file,
    from_csv,
    from_jsonl,
    from_pairs,
    is_hidden,
    roots_of,
)
from afa.errors import UserError
from afa.experts.spec import HUB_ID
from afa.lazy import load

# (files, columns, what is left out) -> the samples
Reader = Callable[[Sequence[Path], Columns, Skipped], Iterable[Sample]]
# ending of a file, or of the files in a folder -> how they are read
FORMS: dict[str, Reader] = {
    ".jsonl": from_jsonl,
    ".csv": from_csv,
    ".parquet": from_parquet,
    ".tar": from_shards,
}
# what a place begins with -> module:function(place) that draws its images
DRAWN = {"scenes:": "afa.demo.data:from_scenes", "near:": "afa.demo.data:from_scenes"}
WANTED = (
    f"a folder with {METADATA} or with a .txt beside every image, a .jsonl or .csv, .parquet files, "
    ".tar shards, or a data set of the hub"
)


def open_source(place: str, columns: Columns | None = None, limit: int | None = None) -> ImageSource:
    """List the images at a place.

    place:   a folder, a file, a pattern of shards, a data set of the hub, scenes:COUNT or near:COUNT
    columns: how data are read
    limit:   list only the first so many; None: all
    Raises UserError if there are no images to train on.
    """
    skipped = Skipped()
    try:
        samples = list(_samples(place, columns or Columns(), skipped, limit))
    except OSError as error:  # no right to read it, a disk that fails, a name that is too long
        raise UserError(f"--data {place[:200]} cannot be read: {error.strerror or error}") from None
    source = ImageSource(place, samples[:limit], skipped)
    if not source.samples:
        raise UserError(f"--data {place} has no image to train on: {source.summary()}")
    return source


def _samples(place: str, columns: Columns, skipped: Skipped, limit: int | None) -> Iterable[Sample]:
    path = Path(place)
    for prefix, drawer in DRAWN.items():
        if place.startswith(prefix):
            drawn: Iterable[Sample] = load(drawer)(place)
            return drawn
    if path.is_dir():
        return _from_directory(path, columns, skipped)
    files = expand(place)
    missing = [file for file in files if not file.is_file()]
    read = FORMS.get(path.suffix)
    if read is not None and files and not missing:
        return read(files, columns, skipped)
    if read is None and not path.exists() and HUB_ID.fullmatch(place.partition("@")[0]):
        return from_hub(place, columns, skipped, limit)
    if read is not None:
        raise UserError(f"--data {place}: there is no file {missing[0] if missing else place}")
    raise UserError(
        f"--data {place} is {'of no known form' if path.exists() else 'not there'}; give {WANTED}"
    )


def _from_directory(folder: Path, columns: Columns, skipped: Skipped) -> Iterable[Sample]:
    """Read a list of images, else parquet files, else shards, else images with captions beside them."""
    lists = [folder / name for name in (METADATA, TABLE) if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(
            f"--data {folder} holds both {METADATA} and {TABLE}; give the list to read: "
            f"{' or '.join(map(str, lists))}"
        )
    if lists:
        return FORMS[lists[0].suffix](lists, columns, skipped)
    for ending in (".parquet", ".tar"):
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob(f"*{ending}"))]
        files = []
        for name in (name for name in names if not is_hidden(name)):
            try:
                files.append(find_file(name, folder, roots_of(folder, columns)))
            except LeftOutError as reason:
                raise UserError(f"--data {folder}: {name} is {reason}") from None
        if files:
            return FORMS[ending](files, columns, skipped)
    return from_pairs(folder, columns, skipped)
