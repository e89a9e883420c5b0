"""Many models, methods and settings in one table: what a comparison is for one model, for a grid, on one machine or many."""
