"""Settings of Gradio events, shared by everything that wires them."""

from __future__ import annotations

from typing import Any

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Handlers of the page itself: no API endpoint, no spinner of Gradio's own."""

QUICK: dict[str, Any] = PRIVATE | {"queue": False}
"""Handlers that return at once; they run while the queue is busy, but cannot show a toast."""

UNLIMITED: dict[str, Any] = {"concurrency_limit": None}
"""In gradio's queue nothing waits: what must not run at the same time waits in a `Lane`, which is fair."""

HEAVY: dict[str, Any] = PRIVATE | UNLIMITED
"""Buttons of the page that run a model."""
