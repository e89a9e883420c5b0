"""A model folder to the hub, with a token that is used once and kept nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowmem.background import stoppable
from lowmem.errors import BadInput, GatedModel, ModelNotFound, Offline
from lowmem.events import CancelToken
from lowmem.models.describe import CONFIG
from lowmem.settings import settings

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LEFT_OUT = ["*.part", "*.tmp", "lock", "journal.json", "source.json", ".*"]


def push(folder: Path, repo: str, token: str, *, private: bool = True, cancel: CancelToken | None = None) -> str:
    """Upload `folder` to the repository `repo` ("name/model"), which is made if need be; returns its address.

    Args:
        token: allowed to write; it goes into the requests' header and nowhere else.

    Raises:
        BadInput: no token, not a repository's name, or not a model folder.
        GatedModel: the hub does not accept the token. Offline: it cannot be reached.
        Cancelled: what was uploaded by then is not part of the repository.
    """
    if not token.strip():
        raise BadInput("There is no token to push with.", "Type one that may write; it is used for this push only.")
    if not _REPOSITORY.fullmatch(repo.strip()):
        raise BadInput(f"{repo.strip()[:80]!r} is not the name of a repository.", "Write it like ada/my-model.")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder.name} is not a model folder.", "Quantize a model first.")
    now = settings()
    if now.hub_offline:
        raise Offline("HF_HUB_OFFLINE is set, so the hub is not asked.", "Unset it to push.")
    return stoppable(
        lambda: _upload(folder, repo.strip(), token.strip(), private, now.hub_endpoint), cancel or CancelToken()
    )


def _upload(folder: Path, repo: str, token: str, private: bool, endpoint: str) -> str:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api: Any = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, ignore_patterns=_LEFT_OUT, commit_message="Quantized with lowmem"
        )
    except HfHubHTTPError as error:
        raise _refusal(error, repo) from None  # its request holds the token
    except (OfflineModeIsEnabled, httpx.HTTPError, OSError):
        raise Offline(f"{endpoint} cannot be reached.", "Check the connection and push again.") from None
    return f"{endpoint}/{repo}"


def _refusal(error: Any, repo: str) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return GatedModel(
            f"The hub does not let this token write to {repo}.", "Make a token with the role write, and type it again."
        )
    if status == 404:
        return ModelNotFound(
            f"The hub has no place {repo}.", "Use your own name or an organisation's before the slash."
        )
    return Offline(f"The hub refused the upload with status {status}.", "Try again later.")
