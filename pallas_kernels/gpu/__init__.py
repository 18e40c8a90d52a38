"""Pallas kernels for GPUs of the Hopper generation, on Mosaic GPU."""
