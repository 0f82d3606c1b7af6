"""Kernels that calibration uses: second moments, GPTQ."""
