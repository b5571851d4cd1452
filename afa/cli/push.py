"""Upload a saved ensemble to the Hugging Face hub, or write what would be uploaded into a folder.

All files appear in one commit; a command that was interrupted goes on where it was. Without --bundle,
afa.json names experts of the hub by commit, and other experts by name and sha256. Log in first with
hf auth login, or set HF_TOKEN.
diffusers loads the result too: DiffusionPipeline.from_pretrained(PLACE, trust_remote_code=True).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.settings import MOVED_HELP, CheckedOptions, option

EXAMPLES = [
    "afa push demo:ensemble --output shared --bundle",
    "afa push demo:ensemble org/my-ensemble --license apache-2.0 --dry-run",
]


@dataclass(frozen=True)
class PushSettings(CheckedOptions):
    """The settings of `afa push`; each field is a flag."""

    ensemble: str = option(place=True, ensemble=True, help="a saved ensemble", positional=True)
    repository: str | None = option(
        None, help="org/name on the hub, which is made if it is not there", positional=True
    )
    output: str | None = option(None, help="a folder to write instead, which can be copied anywhere")
    bundle: bool = option(False, help="with the experts, so that the ensemble stands alone")
    license: str | None = option(
        None, help="for the card, such as apache-2.0 (default: the experts' own, if all have the same)"
    )
    private: bool = option(
        False, help="make a new repository private (default: as the account is set); one that is there stays"
    )
    revision: str | None = option(None, help="a branch that is there (default: main)")
    message: str | None = option(None, help="of the commit")
    experts: list[str] | None = option(None, place=True, help=MOVED_HELP)
    dry_run: bool = option(False, help="list the files and stop; nothing is written or uploaded")
    json: bool = option(False, help="print the result as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.repository is None) == (self.output is None):
            raise UserError("give either a repository, org/name, or --output FOLDER")
        for flag in ("revision", "message", "private"):
            if self.output is not None and getattr(self, flag):
                raise UserError(
                    f"--{flag} is for the hub, and --output {self.output} is a folder; leave it out"
                )
        if self.output is not None and Path(self.output).resolve() == Path(self.ensemble).resolve():
            raise UserError(f"--output {self.output} is the ensemble itself; give another folder")


Options = PushSettings


def run(options: Options) -> None:
    """Upload or write, and print where it is."""
    from afa.checkpoint.hub import check_repository, push
    from afa.checkpoint.publish import publication
    from afa.cli.main import hush

    hush()
    if options.repository is not None and not options.dry_run:
        check_repository(options.repository)
    published = publication(
        Path(options.ensemble),
        bundle=options.bundle,
        given=options.experts or [],
        licence=options.license,
        repository=options.repository,
    )
    if published.private:
        print(
            f"afa: {', '.join(published.private)} will not be found on other machines: users of the "
            "ensemble need the same files (--experts FOLDER finds them by sha256); --bundle includes them",
            file=sys.stderr,
        )
    facts: dict[str, Any] = {"files": sorted(published.files), "bytes": published.bytes}
    if not options.dry_run:
        facts["place"] = _done(options, published, push)
    print(json.dumps(facts, indent=2) if options.json else _words(facts))


def _done(options: Options, published: Any, push: Any) -> str:
    if options.output is not None:
        published.write(Path(options.output))
        return options.output
    where = {"revision": options.revision, "message": options.message}
    return str(push(published, options.repository, private=options.private or None, **where))


def _words(facts: dict[str, Any]) -> str:
    size = f"{len(facts['files'])} files, {facts['bytes'] / 1e6:,.1f} MB"
    return f"{size}: {facts['place']}" if "place" in facts else "\n".join([*facts["files"], size])
