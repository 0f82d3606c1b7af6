"""The `wush::` ops: schemas, fake kernels, and the reference that defines each op on every device (docs/spec.md §6).

core.py      observe, transform_quantize, fp4_linear
fused.py     a norm or a gated activation in front of transform_quantize; only passes emit these ops
grouped.py   fp4_grouped_linear: each row times the weight of its own expert
observe_cross.py   what the groups in front have changed in a group's input
observe_experts.py   observe, for each expert from the rows that are routed to it
schema.py    one signature an op, and the check that every function of the op has it
straight_through.py   the gradient of a quantized linear
layouts.py   how scales lie in memory
"""
