"""Result folders of the page: creating, finding and pushing them to the hub."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.models.push import push
from lowmem.settings import settings
from lowmem.ui.service.access import Access


def new_folder(kind: str) -> Path:
    """A new folder for the files of one action, below `settings().outputs`.

    The page serves what is below that folder to everybody, so that its name is what keeps the files private.
    """
    folder = settings().outputs / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(16)}"
    folder.mkdir(parents=True)
    return folder


def result_folder(access: Access, folder: str) -> Path:
    """The path of a result made by this page.

    Raises:
        BadInput: there is no such folder, it is not below `settings().outputs`, or it is somebody else's.
    """
    path = Path(folder).resolve()
    known = folder and path.is_dir() and path.is_relative_to(settings().outputs.resolve())
    if not known or not access.may_use(path):
        raise BadInput(msg("Only results of this page can be used."), msg("Quantize or export a model first."))
    return path


def push_result(
    access: Access, folder: str, repo: str, token: str, private: bool, cancel: CancelToken
) -> Iterator[str]:
    """Upload a finished folder to the hub; yields its address. Only the page's owner may.

    Args:
        token: of the hub, with write access; "" for the owner's own.
    """
    access.require_owner(msg("Pushing to the hub"))
    path = result_folder(access, folder)
    yield push(path, repo, token.strip() or settings().hub_token or "", private=private, cancel=cancel)
