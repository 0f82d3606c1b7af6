"""Captures the whole forward of a model as one graph.

export.py    calls torch.export: every dimension dynamic, weights by name
repeats.py   traces one of several identical layers and copies its graph
wrappers.py  takes off what others put around a model: compilers, data parallelism, offload hooks
meta.py      copies a model's structure without its weights
known.py     computes with inputs whose values are known
numbers.py   keeps the values of numbers that become tensors on the meta device
"""
