"""The Triton provider.

provider.py    its ops, and the calls it refuses
packaged/      the same kernels as launches in a graph, for programs without Python
common/        formats, decoding, epilogues, memory and overlap that several kernels use
quantize/      transform and quantize activations, with a norm or an activation in front
linear/        fp4_linear: one kernel for each range of rows
grouped/       fp4_grouped_linear: the same products, each row with the weight of its own expert
calibration/   second moments and GPTQ
"""
