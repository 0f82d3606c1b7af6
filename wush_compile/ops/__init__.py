"""The `wush::` ops: schemas, fakes, and the reference that defines each op on every device (docs/spec.md §6).

core.py    observe, transform_quantize, fp4_linear
fused.py   a norm or a gated activation in front of transform_quantize; only passes emit these
"""
