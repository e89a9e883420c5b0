"""Sweeps: comparisons over a grid of models, methods and settings, on one machine or on a cluster."""
