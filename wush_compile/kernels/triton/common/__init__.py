"""What several kernels share: formats, decoding, epilogues, memory, overlap of kernels."""
