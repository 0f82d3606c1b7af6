"""Saves quantized models and loads them (docs/spec.md §7).

record.py      how a model was quantized: the `quantization_config`, and the report of the run
layout.py      the buffers of groups in memory <-> the tensors of linears on disk
files.py       reads the files: names, headers, tensors, digests
atomic.py      replaces a file or a directory in one step
save_load.py   save and load
names.py       fits a record to a model with another head, or one that has changed
hf.py          transformers' `from_pretrained` and `save_pretrained`
patches.py     what transformers does not ask a quantizer when it saves
conversion.py  makes tensors of a model from those of files, as transformers does while it loads
gguf.py        reads GGUF models
"""
