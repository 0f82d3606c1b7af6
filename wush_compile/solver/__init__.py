"""From a group's weights and second moment to its transform, codes and scales (docs/spec.md §2-4).

solve.py        one group, step by step
solution.py     what the solver returns, and the shapes that follow from a recipe
transforms.py   T_b in float64, and its rounding to the model's dtype
choose.py       which T_b each block gets, and from which moments
scales.py       the global scales of both sides
gptq.py         rounding with error propagation
loss.py         the loss of a solution, on rows of calibration data
"""
