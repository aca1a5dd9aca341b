"""Kernels that are not PyTorch: source for the device's own compiler, and how it is built."""
