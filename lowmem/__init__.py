"""lowmem: language models on machines with little memory, inside a budget that is kept."""

__version__ = "0.1.0"
