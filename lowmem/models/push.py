"""Uploading a model folder to the hub, with a token that is used once and never stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowmem.background import stoppable
from lowmem.errors import BadInput, GatedModel, ModelNotFound, Offline
from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.models.model_files import CONFIG
from lowmem.settings import settings

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LEFT_OUT = ["*.part", "*.tmp", "lock", "journal.json", "source.json", ".*"]


def push(folder: Path, repo: str, token: str, *, private: bool = True, cancel: CancelToken | None = None) -> str:
    """Upload `folder` to the repository `repo` ("name/model"), creating it if necessary; returns its URL.

    Args:
        token: must have write access; it is sent in the header of the requests and goes nowhere else.

    Raises:
        BadInput: no token, not a repository's name, or not a model folder.
        GatedModel: the hub rejects the token.
        Offline: the hub cannot be reached.
        Cancelled: nothing was committed to the repository.
    """
    if not token.strip():
        raise BadInput(
            msg("A token is needed to push."), msg("Enter one with write access; it is used for this push only.")
        )
    if not _REPOSITORY.fullmatch(repo.strip()):
        raise BadInput(
            msg("{repo!r} is not the name of a repository.", repo=repo.strip()[:80]), msg("Write it like ada/my-model.")
        )
    if not (folder / CONFIG).is_file():
        raise BadInput(msg("{folder} is not a model folder.", folder=folder.name), msg("Quantize a model first."))
    now = settings()
    if now.hub_offline:
        raise Offline(msg("HF_HUB_OFFLINE is set, so the hub is not contacted."), msg("Unset it to push."))
    return stoppable(
        lambda: _upload(folder, repo.strip(), token.strip(), private, now.hub_endpoint), cancel or CancelToken()
    )


def _upload(folder: Path, repo: str, token: str, private: bool, endpoint: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api: Any = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, ignore_patterns=_LEFT_OUT, commit_message=msg("Quantized with lowmem")
        )
    except HfHubHTTPError as error:
        raise _refusal(error, repo) from None  # its request holds the token
    except Exception as error:
        # huggingface_hub raises the exceptions of its HTTP library: httpx in 1.x, httpx2 in 2.x.
        if not (isinstance(error, OfflineModeIsEnabled | OSError) or type(error).__module__.startswith("httpx")):
            raise
        raise Offline(
            msg("{endpoint} cannot be reached.", endpoint=endpoint), msg("Check the connection and push again.")
        ) from None
    return f"{endpoint}/{repo}"


def _refusal(error: Any, repo: str) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return GatedModel(
            msg("This token has no write access to {repo}.", repo=repo),
            msg("Create a token with write access and enter it."),
        )
    if status == 404:
        return ModelNotFound(
            msg("The hub does not know {repo}.", repo=repo),
            msg("Put your user name or an organization before the slash."),
        )
    return Offline(msg("The hub refused the upload with status {status}.", status=status), msg("Try again later."))
