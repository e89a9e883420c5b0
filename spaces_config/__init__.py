"""lowmem at home elsewhere: Spaces of two kinds (`build` puts one together), a Colab notebook (`address`)."""
