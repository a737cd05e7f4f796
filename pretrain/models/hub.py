"""Uploading a converted folder to the Hugging Face hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import StorageError, UserError, first_line


def check_login(repository: str) -> None:
    """Raises UserError when an upload to OWNER/NAME could not begin: before hours of conversion, not after."""
    import huggingface_hub

    if repository.count("/") != 1:
        raise UserError(f"--push {repository}: expected OWNER/NAME")
    with _one_line(repository):
        huggingface_hub.utils.validate_repo_id(repository)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {repository}: HF_HUB_OFFLINE is set; unset it, or leave out --push")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {repository}: not logged in; run `hf auth login`, or set HF_TOKEN")


def push(files: Mapping[str, Path], repository: str) -> str:
    """Uploads files, by their names in the repository, in one commit, and returns the address.

    The repository is made if need be.

    Raises UserError when the hub refuses, StorageError when it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    with _one_line(repository):
        address = HfApi().create_repo(repository, exist_ok=True)
        HfApi().create_commit(repository, added, commit_message="Upload converted weights")
    return str(address)


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"--push {repository}: the hub refused ({first_line(error)}); the folder itself is complete"
        ) from None
    except Exception as error:
        client = type(error).__module__.partition(".")[0]  # the hub's HTTP client, another one in other versions
        if not (isinstance(error, OSError) or client in ("httpx", "httpx2", "requests")):
            raise
        raise StorageError(
            f"--push {repository}: the hub cannot be reached ({first_line(error)}); the folder itself is complete"
        ) from None
