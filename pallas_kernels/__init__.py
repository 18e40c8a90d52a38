"""Kernels, one room for each kind of device. They know the language and JAX, and nothing that is built on them."""
