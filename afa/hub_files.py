"""The Hugging Face hub without long waits where there is no network: a file of it, and whether it answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def hub_file(repository: str, name: str, revision: str | None = None, **where: Any) -> Path:
    """Download one file of a repository, or find it in the cache. Raises an error of the hub.

    Without a network the error comes at once; hf_hub_download alone tries for half a minute.
    repository: org/name
    name:       of the file
    revision:   branch, tag or commit; None: the default branch
    where:      cache_dir, token, local_files_only and etag_timeout of hf_hub_download
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    known = try_to_load_from_cache(repository, name, cache_dir=where.get("cache_dir"), revision=revision)
    if not isinstance(known, str) and not where.get("local_files_only") and not constants.is_offline_mode():
        timeout = {"timeout": where["etag_timeout"]} if "etag_timeout" in where else {}
        get_hf_file_metadata(
            hf_hub_url(repository, name, revision=revision), token=where.get("token"), **timeout
        )
    return Path(hf_hub_download(repository, name, revision=revision, **where))


@contextmanager
def answering_hub() -> Iterator[bool]:
    """Within, libraries take what is in their caches, and do not wait for a hub that does not answer.

    Yields whether it answers.
    """
    import datasets
    from huggingface_hub import constants, errors, get_session

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        answers = True
    except (errors.HTTPError, OSError):
        answers = False
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
