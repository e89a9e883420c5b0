"""A toy of every causal model type that transformers builds, and what lowmem does with each."""
