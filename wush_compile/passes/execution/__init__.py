"""The passes that `torch.compile(backend="wush")` and `wush_compile.fuse` run, in the order of `passes/pipeline.py`.

drop_identities, cse, drop_copies, merge_siblings, fuse_epilogue, quantize_before_views, fuse_norm, fuse_activation,
cleanup, lower, lay_out_scales
package   replaces every wush op, for programs that run without Python
paste     replaces a node by a traced graph, for `lower` and `package`
"""
