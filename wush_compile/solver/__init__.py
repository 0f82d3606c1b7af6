"""Solves a group: its weights and second moment give its transform, codes and scales (docs/spec.md §2-4).

solve.py        one group, step by step
solution.py     what the solver returns, and the shapes that follow from a recipe
correction.py   weights that make up for the groups in front of them
transforms.py   T_b in float64, and its rounding to the model's dtype
choose.py       the transform that each block gets, and the moments it follows from
feedback.py     the numbers of rounding with feedback, and the rotation of T for it
scales.py       the global scales of weights and activations
order.py        which blocks GPTQ rounds first
row_factors.py  the factor of each row of an MXFP4 weight
gptq.py         rounding with error propagation
experts.py      a product of all experts of a layer: one transform, GPTQ an expert
side_by_side.py weights with a given transform, several at once
loss.py         the loss of a solution, on rows of calibration data
facts.py        curves of the activations' power, for the report
"""
