"""Attention functions for decoding that copy no cache, as implementations of transformers, for `end_to_end.py`."""

import torch
from torch.nn.attention.flex_attention import flex_attention


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """An attention function of transformers for decoding. Query heads [B, H, 1, D] that share keys and values become
    the rows of one head, so the cache is read in place."""
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    if length == 1:
        query = query.view(batch, heads // group, group, width)
        mask = None if attention_mask is None else attention_mask.expand(batch, 1, group, key.shape[2])
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return y.reshape(batch, 1, heads, width), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)


def split_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """An attention function of transformers for decoding, by FlexAttention: it shares keys and values among heads, and
    several programs share the cache of a head."""
    if query.shape[2] > 1 or attention_mask is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling=scaling)

    def masked(score, batch, head, row, column):
        return torch.where(attention_mask[batch, 0, 0, column], score, -float("inf"))

    y = flex_attention(query, key, value, score_mod=masked, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


ATTENTION = {"grouped": grouped_attention, "split": split_attention}


def register_attention() -> None:
    """Makes the functions of `ATTENTION` implementations of transformers, with the masks of its sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, function in ATTENTION.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
