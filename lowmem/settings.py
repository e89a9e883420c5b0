"""The only module that reads environment variables.

They are read on every call, so that a test or a notebook cell can change them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Paths of lowmem's files, and the settings of the host.

    `memory` is the RAM that the host declares (Spaces set `MEMORY`, e.g. "15Gi"). `hub_token` is used for requests and
    never written to disk. `visible_gpus` is `CUDA_VISIBLE_DEVICES`, None if every GPU may be used; `threads` is
    `OMP_NUM_THREADS`, which torch follows.
    """

    home: Path
    host: str
    memory: str
    hub_endpoint: str
    hub_offline: bool
    hub_token: str | None = field(default=None, repr=False)
    visible_gpus: str | None = None
    threads: str = ""

    @property
    def models(self) -> Path:
        """Downloaded and converted models, one folder each."""
        return self.home / "models"

    @property
    def outputs(self) -> Path:
        """Files that the app writes for people to download."""
        return self.home / "outputs"


def settings() -> Settings:
    """The current settings, from the environment."""
    env = os.environ
    default_home = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem"
    return Settings(
        home=Path(env.get("LOWMEM_HOME") or default_home).expanduser().resolve(),
        host=_host(),
        memory=env.get("MEMORY", ""),
        hub_endpoint=(env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        hub_offline=env.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
        hub_token=env.get("HF_TOKEN") or None,
        visible_gpus=env.get("CUDA_VISIBLE_DEVICES"),
        threads=env.get("OMP_NUM_THREADS", ""),
    )


def gpu_is_attached() -> None:
    """Called in the worker of a ZeroGPU Space: from now on this process is treated as one with a GPU of its own."""
    os.environ.pop("SPACES_ZERO_GPU", None)


_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
"""In the name of a variable whose value is a secret."""


def child_environment(*, hub: bool = False) -> dict[str, str]:
    """The environment of a child process: without secrets, and of a ZeroGPU Space without the GPU, which it has not.

    Args:
        hub: the child may fetch from the hub, so it gets `HF_TOKEN`.
    """
    env = {
        name: value for name, value in os.environ.items() if not _SECRET.search(name) or (hub and name == "HF_TOKEN")
    }
    return env | ({"SPACES_ZERO_GPU": "", "CUDA_VISIBLE_DEVICES": ""} if _host() == "zerogpu" else {})


def _host() -> str:
    """ "zerogpu", "space", "colab" or "local"."""
    env = os.environ
    if env.get("SPACES_ZERO_GPU", "").lower() in {"1", "true"}:
        return "zerogpu"
    if env.get("SYSTEM") == "spaces" or env.get("SPACE_ID"):
        return "space"
    # Inherited by `!python app.py`, in which a check for IPython would not find the notebook.
    if env.get("COLAB_RELEASE_TAG"):
        return "colab"
    return "local"
