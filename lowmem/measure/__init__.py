"""What a model is worth after it was made smaller: quality, size, speed and memory, side by side."""
