"""Ensembles of the Hugging Face hub: downloaded without code, and uploaded in one commit."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.checkpoint.publish import Publication, own_files, publication, stale
from afa.errors import UserError
from afa.hub_files import hub_file
from afa.places import on_hub, snapshot_id
from afa.version import __version__

if TYPE_CHECKING:
    from afa.ensemble import Ensemble

MESSAGE = "Upload an ensemble with afa"
LOG_IN = "log in with: hf auth login, or set HF_TOKEN"


def fetch_ensemble(
    place: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download an ensemble into the hub's cache, or find it there. An interrupted download goes on.

    place: org/name, org/name@revision, or a folder, which is returned as it is
    Other arguments: see Ensemble.from_pretrained
    Returns its folder, which has the manifest and the files that it names, and no code.
    Raises UserError for what is no ensemble, or cannot be downloaded.
    """
    found = on_hub(place)
    if Path(place).is_dir():
        if revision is not None:
            raise UserError(f"{place} is a folder, and revision {revision} is for a repository; leave it out")
        known = snapshot_id(Path(place))
        if known is None or (Path(place) / MANIFEST).exists():
            return Path(place)
        found, cache_dir = on_hub(known), cache_dir or Path(place).absolute().parents[2]
    if found is None:
        raise UserError(
            f"there is no folder {place}, and it is no hub id; write org/name or org/name@revision"
        )
    from huggingface_hub import snapshot_download

    name, named = found
    if named is not None and revision is not None and named != revision:
        raise UserError(f"{place} and revision {revision} disagree; give one of them")
    revision = revision or named
    where = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    with plain_errors(name, revision):
        folder = hub_file(name, MANIFEST, revision, **where).parent
    files = own_files(read_manifest(folder))
    with plain_errors(name, revision):
        # the commit of the manifest, whatever the branch is by now
        snapshot_download(name, revision=folder.name, allow_patterns=files, **where)
    return folder


def fetch_if_ensemble(place: str) -> Path | None:
    """The folder of an ensemble as fetch_ensemble finds it; None for a repository without a manifest.

    A repository that cannot be read is None too: as an expert it is named with the reason.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    found = on_hub(place)
    if found is None:
        return None
    try:
        hub_file(found[0], MANIFEST, found[1])
    except (HTTPError, HFValidationError, LocalEntryNotFoundError):
        return None
    return fetch_ensemble(place)


def push(
    published: Publication,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an ensemble in one commit: a reader sees all of it or nothing.

    Large files that an interrupted upload has sent are not sent again.
    repository: org/name, which is made if it is not there
    Other arguments: see Ensemble.push_to_hub
    Returns the URL of the commit. Raises UserError.
    """
    check_repository(repository)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="afa", library_version=__version__)
    with plain_errors(repository, revision):
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        if MANIFEST not in there and (other := {"model_index.json", "config.json"} & set(there)):
            raise UserError(
                f"{repository} holds another model ({min(other)}) and no {MANIFEST}; "
                "give the ensemble a repository of its own"
            )
        adds = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file.encode())
            for name, file in sorted(published.files.items())
        ]
        deletes = [CommitOperationDelete(name) for name in stale(there, published.files)]
        done = api.create_commit(
            repository, [*adds, *deletes], commit_message=message or MESSAGE, revision=revision
        )
    return str(done.commit_url)


def push_ensemble(
    ensemble: "Ensemble", repository: str, *, bundle: bool, licence: str | None, **where: object
) -> str:
    """See Ensemble.push_to_hub."""
    check_repository(repository)
    in_memory = any(expert.located is None for expert in ensemble.experts)
    with tempfile.TemporaryDirectory(prefix="afa-push-") as place:
        folder = Path(place) / "ensemble"
        ensemble.save(folder, bundle=bundle and in_memory)
        published = publication(
            folder, bundle=bundle and not in_memory, licence=licence, repository=repository
        )
        return push(published, repository, **where)  # type: ignore[arg-type]


def check_repository(name: str) -> None:
    """Raise UserError for what is no name of a repository, and where the hub may not be asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name, _, rest = name.partition("@")
        hint = f"give the branch as --revision {rest}" if rest else "write org/name"
        raise UserError(f"'{name}' is no name of a repository on the hub; {hint}") from None
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise UserError(f"{name} cannot be uploaded: HF_HUB_OFFLINE is set; unset it")


@contextlib.contextmanager
def plain_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one sentence each. name: of the repository"""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on its page on the hub, and {LOG_IN}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no repository {name} on the hub, or it is private and the token does not open it; "
            f"check its name, or {LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision}; give a branch, tag or commit that is there"
        ) from None
    except errors.RemoteEntryNotFoundError as error:
        lost = f"has no {MANIFEST}" if MANIFEST in str(error) else "misses a file that it names"
        raise UserError(f"{name}{at} is no ensemble of afa: it {lost}") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {name}{at}: {_refusal(error)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise UserError(f"{name}{at} {_unreachable(error)}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}{at} cannot be on the hub: {str(error).splitlines()[0]}") from None


def _refusal(error: Exception) -> str:
    """Why the hub refused, in one line."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return f"the token is not valid (401); {LOG_IN}"
    if status == 403:
        return f"the token may not do this (403); {LOG_IN} with a token that may write"
    words = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
    return f"{words:.200} ({status})" if status else f"{words:.200}"


def _unreachable(error: Exception) -> str:
    """Why the hub cannot be asked."""
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return "is not in the hub's cache as a whole, and HF_HUB_OFFLINE is set; unset it to download"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is None:
        return "is not in the hub's cache as a whole; let it be downloaded (local_files_only=False)"
    reason = str(error.__cause__ or error).strip().partition("\n")[0]
    return f"cannot be had: the hub does not answer ({reason:.120}); check the network and repeat the command"
