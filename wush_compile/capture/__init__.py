"""A model and an example batch become one graph of the whole forward.

export.py    torch.export, dynamic in every dimension, with weights by name
repeats.py   traces one of several identical layers and copies its graph
"""
