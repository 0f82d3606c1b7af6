"""`make demo`: quantizes SmolLM2-135M-Instruct on a CPU and compares the results."""
