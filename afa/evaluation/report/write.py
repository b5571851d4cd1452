"""From folders of evaluations to the files of a report."""

from collections.abc import Sequence
from pathlib import Path

from afa.errors import UserError
from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.report.longform import as_csv
from afa.evaluation.report.markdown import as_markdown
from afa.evaluation.report.page import as_html
from afa.evaluation.results import Results
from afa.files import locked, write_atomically


def write_report(folders: Sequence[Path], output: Path, markdown: Path | None = None, csv: Path | None = None) -> list[Analysis]:
    """Write the page, and the Markdown and the CSV beside it unless other places are given. -> what they were made of.

    Raises UserError for folders without results, results that nothing can be computed from, and places that cannot be written.
    """
    markdown, csv = markdown or output.with_suffix(".md"), csv or output.with_suffix(".csv")
    _check(folders, {"--output": output, "--markdown": markdown, "--csv": csv})
    several = analyse([_load(folder) for folder in folders], folders)
    names = _names(several, folders)
    with locked(output, file=True):
        for path, made in ((output, as_html), (markdown, as_markdown), (csv, as_csv)):
            content = made(several, names)
            with locked(path, file=True):
                write_atomically(path, content)
    return several


def _check(folders: Sequence[Path], outputs: dict[str, Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is given twice; give each evaluation once")
        seen.add(folder.resolve())
    if outputs["--output"].suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {outputs['--output']} must end in .html; Markdown and CSV go to --markdown and --csv")
    for flag, path in outputs.items():
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; give a file, such as {path / 'report.html'}")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UserError(f"{' and '.join(f'{flag} {path}' for flag, path in outputs.items())} must be different files")


def _load(folder: Path) -> Results:
    if not folder.exists():
        raise UserError(f"there is no folder {folder}; make it with: afa evaluate … --output {folder}")
    return Results.load(folder)


def _names(several: Sequence[Analysis], folders: Sequence[Path]) -> list[str]:
    """The protocols' names; with the folder where two are the same."""
    protocols = [str(one.results.protocol.get("name", folder.name)) for one, folder in zip(several, folders, strict=True)]
    return [f"{name} ({folder})" if protocols.count(name) > 1 else name for name, folder in zip(protocols, folders, strict=True)]
