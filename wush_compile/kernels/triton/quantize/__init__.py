"""Kernels that transform and quantize activations."""
