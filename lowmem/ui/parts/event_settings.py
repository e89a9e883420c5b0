"""Settings of Gradio events, shared by everything that wires them."""

from __future__ import annotations

from typing import Any

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Handlers of the page itself: no API endpoint, no spinner of Gradio's own."""

QUICK: dict[str, Any] = PRIVATE | {"queue": False}
"""Handlers that return at once; they run while the queue is busy, but cannot show a toast."""

ENGINE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "engine"}
"""Everything that runs a model, endpoints included: one at a time, from one queue."""

HEAVY: dict[str, Any] = PRIVATE | ENGINE
"""Buttons of the page that run a model."""
