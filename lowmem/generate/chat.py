"""The messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ChatMessage = Mapping[str, Any]
"""{"role": system, user or assistant, "content": a text, or a list of {"type": "text", "text": ...}}."""

ROLES = ("system", "user", "assistant")
