"""What is on disk, and how models get there and back (docs/spec.md §7).

record.py      how a model was quantized: the `quantization_config`
layout.py      groups in memory <-> the tensors of their linears on disk
files.py       names, headers and digests of the files
atomic.py      replaces a file or a directory in one step
save_load.py   save and load
hf.py          transformers' `from_pretrained` and `save_pretrained`
gguf.py        reads GGUF models
"""
