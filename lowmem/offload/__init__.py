"""Running models that do not fit: blocks stream from RAM or disk through the device that computes."""
