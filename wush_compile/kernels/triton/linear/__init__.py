"""Kernels of `wush::fp4_linear`."""
