"""The one resident model."""
