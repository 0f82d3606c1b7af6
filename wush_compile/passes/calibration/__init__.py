"""Passes over the graph of the whole model, in the order in which calibration runs them.

group.py       finds the linears, and groups those with the same input
place.py       moves the graph to the compute device
observe.py     puts a `wush::observe` node in front of each group
partition.py   cuts the graph into stages: the inputs, each repeated layer, the outputs
rewrite.py     replaces a solved group's linears by `transform_quantize` and `fp4_linear`
"""
