"""Texts longer than the memory or the model's context: sliding windows, streaming through a window, quantized caches."""
