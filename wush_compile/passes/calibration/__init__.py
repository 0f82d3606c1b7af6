"""Passes over the graph of the whole model, in the order in which calibration runs them.

linears.py     what a linear is in a graph; makes one node of linears that a trace took apart
experts.py     finds the products of experts, and routers
group.py       groups the linears with the same input
encoders.py    finds encoders of images or sound in front of a language model
skipped.py     why a weight is not quantized
tied.py        embeddings that share a head's weight
dataflow.py    which values depend on which inputs
place.py       moves the graph to the compute device
observe.py     puts a `wush::observe` node in front of each group
reference.py   the unquantized stages that run beside, and the steps of a stage
cut.py         cuts a part out of a stage, from values that are there to values that are wanted
taps.py        puts a tap behind each linear, which collects gradients in a backward pass
partition.py   cuts the graph into stages: the inputs, each repeated layer, the outputs
rewrite.py     replaces a solved group's linears by `transform_quantize` and `fp4_linear`
"""
