"""lowmem at home elsewhere: Spaces of two kinds, a Colab notebook. `python -m spaces_config.build` puts a Space together."""
