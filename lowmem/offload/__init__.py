"""Running what does not fit: blocks that stream from RAM or disk through the device that computes."""
