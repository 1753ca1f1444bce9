"""Push a finished output folder to the Hugging Face Hub, after a check before any work that this will be possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.published import without_paths

RECIPE = "recipe.yaml"

_UNREACHABLE = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError)


def check_push(repo: str, *, overwrite: bool = False) -> None:
    """Check, before any work, that :func:`push_to_hub` can upload to a repository.

    Parameters
    ----------
    repo
        "USER/NAME" or "ORGANISATION/NAME".
    overwrite
        Accept a repository that already holds files.

    Raises
    ------
    InvalidInput
        If the name is malformed, no user is logged in, the namespace belongs to someone else, the repository holds
        files, or the Hub does not answer.
    """
    namespace, _, name = repo.partition("/")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InvalidInput(f"--push-to-hub {repo}: {error}; write USER/NAME") from None
    if not namespace or not name:
        raise InvalidInput(f"--push-to-hub {repo}: write USER/NAME or ORGANISATION/NAME")
    api = HfApi()
    try:
        account = api.whoami()
        own = {account["name"], *(group["name"] for group in account.get("orgs", []))}
        if namespace not in own:
            raise InvalidInput(
                f"--push-to-hub {repo}: {account['name']} may push only to: {', '.join(sorted(own))}"
            )
        existing = _files(api, repo)
    except LocalTokenNotFoundError:
        raise InvalidInput(
            f"--push-to-hub {repo}: not logged in: run `hf auth login` or set HF_TOKEN"
        ) from None
    except _UNREACHABLE as error:
        raise InvalidInput(
            f"--push-to-hub {repo}: the Hub does not accept it: {_line(error)}; "
            "push later with `hf upload`, or leave the flag out"
        ) from None
    if existing and not overwrite:
        raise InvalidInput(
            f"--push-to-hub {repo}: the repository holds {existing[0]}; name another, or --overwrite"
        )


def push_to_hub(
    folder: Path, repo: str, *, private: bool = False, overwrite: bool = False, message: str
) -> str:
    """Upload a folder to the Hugging Face Hub as one commit, and return the repository's address.

    Parameters
    ----------
    folder
        Finished output of a run.
    repo
        "USER/NAME" or "ORGANISATION/NAME".
    private
        Make the repository private if it is new.
    overwrite
        In the same commit, remove files of the repository that the folder does not have.
    message
        Title of the commit.

    Raises
    ------
    FbnPruneError
        If the upload fails; the folder is kept.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        with _public_copy(folder) as copy:
            api.upload_folder(
                repo_id=repo,
                folder_path=copy,
                commit_message=message,
                delete_patterns="*" if overwrite else None,
            )
    except _UNREACHABLE as error:
        raise FbnPruneError(
            f"{folder} is written but was not pushed to {repo}: {_line(error)}; "
            f"push it with: hf upload {repo} {folder}"
        ) from error
    return str(address)


@contextmanager
def _public_copy(folder: Path) -> Iterator[Path]:
    """Yield a folder of links to the output's files, with a recipe that names no local paths."""
    with TemporaryDirectory() as temporary:
        for file in folder.rglob("*"):
            place = Path(temporary, file.relative_to(folder))
            if file.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            elif file.name == RECIPE:
                recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
                shown = yaml.safe_dump(without_paths(recipe), sort_keys=False)
                place.write_text(shown, encoding="utf-8")
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.resolve())
        yield Path(temporary)


def _files(api: HfApi, repo: str) -> list[str]:
    """Return the files of a repository except those that the Hub creates; empty if it does not exist."""
    try:
        return [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
    except RepositoryNotFoundError:
        return []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
