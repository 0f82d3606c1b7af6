"""`make demo`: SmolLM2-135M-Instruct, quantized in four ways on a CPU."""
