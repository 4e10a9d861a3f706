"""Whether a device computes what it should, and how fast: the parts of `datencoder check`."""
