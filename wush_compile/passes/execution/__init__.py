"""Passes that `torch.compile(backend="wush")` and `wush_compile.fuse` run; `passes/pipeline.py` has their order.

cse, merge_siblings, fuse_epilogue, fuse_norm, fuse_activation, cleanup, lower, lay_out_scales
package   for programs that run without Python: no wush op is left
paste     what `lower` and `package` share: a node becomes a traced graph
"""
