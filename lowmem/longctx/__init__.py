"""Texts longer than memory or a model's context: windows over them, streams through them, smaller keys and values."""
