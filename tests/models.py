"""Tiny random language models, quantized. Each kind is made once a process; callers get a copy."""

import copy
import functools

import torch
from helpers import quantize
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class Pair(nn.Module):
    """Two siblings, a linear behind them, a residual: Inductor can round nothing here differently from eager."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.left = nn.Linear(width, width + 128, dtype=torch.bfloat16)
        self.right = nn.Linear(width, 128, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(width + 256, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return x + self.down(torch.cat((self.left(x), self.right(x)), -1))


def pair_rows(*lead: int, width: int = 256) -> torch.Tensor:
    """Random rows of that width in bf16, the same for the same leading sizes."""
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(sum(lead))).bfloat16()


def pair(layers: int = 1, **settings) -> nn.Module:
    """Quantized `Pair`s in a row."""
    torch.manual_seed(0)
    return quantize(
        nn.Sequential(*(Pair() for _ in range(layers))), pair_rows(32), **{"transform": "hadamard", **settings}
    )


KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
VOCABULARY = 97


def plain(kind: str, dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> nn.Module:
    """A random model in full precision; built in its dtype, since `.to` would round RoPE's frequencies too."""
    torch.manual_seed(0)
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return model_class._from_config(config, dtype=dtype).eval()


@functools.cache
def _quantized(kind: str, format: str, dtype: torch.dtype, layers: int) -> nn.Module:
    data = [tokens(2, 16, seed=1)]
    rules = {"weight_scale_rule": "absmax", "activation_scale_rule": "absmax"}
    return quantize(plain(kind, dtype, layers), *data, format=format, transform="hadamard", **rules)


def quantized(
    kind: str = "llama", format: str = "mxfp4", dtype: torch.dtype = torch.bfloat16, layers: int = 2
) -> nn.Module:
    """A quantized model of its own: tests may change it."""
    return copy.deepcopy(_quantized(kind, format, dtype, layers))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
