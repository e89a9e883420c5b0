"""Quantized layers and the methods that make them."""
