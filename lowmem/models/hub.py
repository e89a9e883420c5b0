"""A client of the Hugging Face Hub: listing a repository, small files, byte ranges, streams.

Knows the hub's URLs and status codes, nothing about models or folders. The token is sent to
`settings().hub_endpoint` only: httpx drops it when a redirect leads to another host.

Why not huggingface_hub, which `push.py` uses: `model_info` and `get_safetensors_metadata` read responses of any
size into memory, even gigabytes from a server that ignores Range; and its exceptions are those of its HTTP library,
which differs between the versions that requirements.txt allows (httpx in 1.x, httpx2 in 2.x). For downloads see
`download.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from lowmem.errors import CorruptModel, GatedModel, LowMemError, ModelNotFound, Offline
from lowmem.messages import msg
from lowmem.models.files import MAX_TEXT, ends_early
from lowmem.models.foreign import build, parse_object
from lowmem.settings import settings
from lowmem.version import __version__

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
REACHABLE_SECONDS = 2.0
RETRY_SECONDS = 60.0

_ask_again: dict[str, float] = {}
"""Endpoint -> the time (`time.monotonic`) from which it is contacted again; infinity once it has answered."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository; `digest` is "sha256:..." (LFS), "git:..." (blob id) or ""."""

    name: str
    size: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    licence: str = ""
    gated: bool = False
    _cache: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def owner(self) -> str:
        return self.repo

    @property
    def names(self) -> Collection[str]:
        return self.files.keys()

    def read(self, name: str) -> bytes:
        """The content of a small file, downloaded once."""
        if name not in self._cache:
            with _request(self.repo, self.url(name)) as response:
                self._cache[name] = _body(response, name)
        return self._cache[name]

    def ranged(self, name: str) -> HubFile:
        return HubFile(self, self.files[name])

    def identity(self, name: str) -> str:
        file = self.files[name]
        return file.digest or f"{self.commit}:{file.size}"

    def url(self, name: str) -> str:
        return f"/{self.repo}/resolve/{self.commit}/{quote(name)}"


def reachable() -> bool:
    """Does the hub answer? Checked once per process and endpoint, and again after a minute while it does not."""
    endpoint = settings().hub_endpoint
    if settings().hub_offline:
        return False
    if time.monotonic() > _ask_again.get(endpoint, 0.0):
        _ask_again[endpoint] = math.inf if _answers(endpoint) else time.monotonic() + RETRY_SECONDS
    return _ask_again[endpoint] == math.inf


def _answers(endpoint: str) -> bool:
    try:
        httpx.head(endpoint, timeout=REACHABLE_SECONDS)
    except (httpx.HTTPError, OSError):
        return False
    return True


def repository(repo: str, revision: str = "main") -> Repository:
    """List a repository, with exact sizes and hashes. One request.

    Raises:
        ModelNotFound, GatedModel, Offline.
    """
    url = f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    with _request(repo, url) as response:
        return parse_listing(repo, _body(response, url))


def parse_listing(repo: str, data: bytes) -> Repository:
    """The repository that the hub describes; raises `CorruptModel` where it does not."""
    what = msg("The hub's description of {repo}", repo=repo)
    listed = build(_Listing, parse_object(data, what), what, msg("Try again later."))
    files = {file.name: file for file in map(_remote_file, listed.siblings)}
    return Repository(repo, listed.sha, files, _licence(listed.cardData or {}), bool(listed.gated))


@dataclass(frozen=True)
class _Listing:
    """What lowmem reads of the hub's description of a repository, under the hub's names."""

    sha: str
    siblings: list[_Sibling]
    cardData: dict[str, Any] | None = None  # noqa: N815
    gated: bool | str | None = None


@dataclass(frozen=True)
class _Sibling:
    rfilename: str
    size: int | None = None
    blobId: str | None = None  # noqa: N815
    lfs: _Lfs | None = None


@dataclass(frozen=True)
class _Lfs:
    sha256: str | None = None
    size: int | None = None


def _remote_file(listed: _Sibling) -> RemoteFile:
    lfs = listed.lfs or _Lfs()
    digest = f"sha256:{lfs.sha256}" if lfs.sha256 else f"git:{listed.blobId}" if listed.blobId else ""
    return RemoteFile(listed.rfilename, max(0, lfs.size or listed.size or 0), digest)


def _licence(card: Mapping[str, Any]) -> str:
    licence = card.get("license_name") or card.get("license")
    return licence if isinstance(licence, str) else ""


class HubFile:
    """A `Ranged` file in a repository: its header is read without downloading the weights that follow."""

    _BLOCK = 128 * 1024  # larger than most safetensors headers: one request instead of two

    def __init__(self, repository: Repository, file: RemoteFile) -> None:
        self.name, self.size = file.name, file.size
        self._repository = repository
        self._first = b""

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise ends_early(self, offset + length)
        if not self._first:
            self._first = self._fetch(0, min(self._BLOCK, self.size))
        if offset + length <= len(self._first):
            return self._first[offset : offset + length]
        return self._fetch(offset, length)

    def _fetch(self, offset: int, length: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        with _request(self._repository.repo, self._repository.url(self.name), headers) as response:
            # A server that ignores Range would send gigabytes: read what is needed, then close the connection.
            skip = 0 if response.status_code == 206 else offset
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
                if len(data) >= skip + length:
                    break
        if len(data) < skip + length:
            raise ends_early(self, offset + length)
        return bytes(data[skip : skip + length])


def stream(repository: Repository, name: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a file from `offset` on as (position, chunk).

    The first position is 0 instead of `offset` when the server does not support Range.

    Raises:
        Offline: the connection broke; call again with the new offset.
    """
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    with _request(repository.repo, repository.url(name), headers) as response:
        position = offset if response.status_code == 206 else 0
        for chunk in response.iter_raw():
            yield position, chunk
            position += len(chunk)


@contextlib.contextmanager
def _request(repo: str, url: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
    """GET a path of the hub; every failure is raised as a `LowMemError`."""
    now = settings()
    if now.hub_offline:
        raise Offline(
            msg("HF_HUB_OFFLINE is set, so the hub is not contacted."), msg("Unset it, or choose a local model.")
        )
    authorization = {"Authorization": f"Bearer {now.hub_token}"} if now.hub_token else {}
    try:
        with _client().stream("GET", now.hub_endpoint + url, headers={**authorization, **(headers or {})}) as response:
            if response.status_code not in (200, 206):
                raise _refusal(repo, response)
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Offline(
            msg("{hub_endpoint} cannot be reached ({error}).", hub_endpoint=now.hub_endpoint, error=_short(error)),
            msg("Check the connection."),
        ) from error


@functools.cache
def _client() -> httpx.Client:
    """One client per process: loading the certificates takes longer than most requests."""
    headers = {"User-Agent": f"lowmem/{__version__}", "Accept-Encoding": "identity"}
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers)


def _refusal(repo: str, response: httpx.Response) -> LowMemError:
    """Map the hub's status codes as huggingface_hub's `hf_raise_for_status` does; a missing repository answers 401."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    page = f"{settings().hub_endpoint}/{repo}"
    if code == "GatedRepo" or (status == 403 and code != "RepoNotFound"):
        hint = (
            msg("Accept it at {page} with the account of your HF_TOKEN.", page=page)
            if settings().hub_token
            else msg("Accept it at {page} and set HF_TOKEN to your token.", page=page)
        )
        return GatedModel(msg("{repo} is gated: its authors require you to accept the license.", repo=repo), hint)
    if code == "RevisionNotFound":
        return ModelNotFound(
            msg("{repo} has no such revision.", repo=repo), msg("See {page} for its branches and commits.", page=page)
        )
    if code == "EntryNotFound":
        return ModelNotFound(msg("A file is missing from {repo}.", repo=repo), msg("See {page}/tree/main.", page=page))
    if status in (401, 404):
        return ModelNotFound(
            msg("There is no model {repo!r} on the hub.", repo=repo),
            msg("Check the spelling; a private one needs HF_TOKEN."),
        )
    return Offline(msg("The hub returned status {status}.", status=status), msg("Try again in a minute."))


def _body(response: httpx.Response, name: str) -> bytes:
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MAX_TEXT:
            raise CorruptModel(
                msg("{name} is larger than {max_text:,} bytes.", name=name, max_text=MAX_TEXT),
                msg("Choose another model."),
            )
    return bytes(data)


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:120]
