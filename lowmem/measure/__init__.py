"""Measures what smaller variants of a model cost and keep: quality, size, speed and memory."""
