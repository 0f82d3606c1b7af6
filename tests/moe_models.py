"""Tiny random mixtures of experts, one of each family: 4 experts, 2 a token, widths of 64."""

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
# family -> (class of transformers without its ending, what it needs besides SIZES)
FAMILIES = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 64}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "layer_types": ["full_attention"]}),
    "deepseek_v3": ("DeepseekV3", GROUPED | LATENT | {"moe_intermediate_size": 64, "num_key_value_heads": 2}),
    "glm4_moe": ("Glm4Moe", GROUPED | {"moe_intermediate_size": 64}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "layer_types": ["full_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronH",
        GROUPED
        | {"num_hidden_layers": 2, "layers_block_type": ["attention", "moe"], "num_key_value_heads": 2}
        | {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "mlp_hidden_act": "relu2"},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4}),
}


def moe(family: str, dtype: torch.dtype = torch.bfloat16, layers: int = 1, **changes) -> nn.Module:
    """A random model of a family in full precision."""
    name, own = FAMILIES[family]
    settings = SIZES | own | changes
    repeated = {key: settings[key] * layers for key in ("layer_types", "layers_block_type") if key in settings}
    settings |= repeated | {"num_hidden_layers": settings["num_hidden_layers"] * layers}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=dtype).eval()
