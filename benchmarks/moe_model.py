"""A mixture of experts in Qwen3-30B-A3B's shape with random weights, for `end_to_end.py --shape qwen3-30b-a3b`."""

import end_to_end
import torch
from attention import register_attention
from speed_quantize_experts import SHAPES

SHAPE = "30b-a3b"  # a test takes `tiny`
GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)))
EXPERTS = ("gate_up_proj", "down_proj")


def build(kind: str, layers: int, attention: str) -> torch.nn.Module:
    """The model on the GPU: bf16, or with the linears of attention and the experts quantized; routers, embeddings and
    the head stay in bf16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    register_attention()
    shape = SHAPES[SHAPE] | {"num_hidden_layers": layers}
    config = Qwen3MoeConfig(**shape, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=40960)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    if kind != "bf16":
        quantize(model, end_to_end.settings_of(kind))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=end_to_end.DEVICE)
                value = value.fill_(1) if parameter.dim() == 1 else value.normal_(std=0.02)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = Qwen3MoeRotaryEmbedding(config).to(end_to_end.DEVICE)
    return model


def quantize(model: torch.nn.Module, settings) -> None:
    """Puts random quantized groups into the place of the empty weights of a model on the meta device."""
    from wush_compile.experts import ExpertGroup
    from wush_compile.modules import Member, WushGroup, buffer_layout, install_group

    for i in range(model.config.num_hidden_layers):
        for part, names in GROUPS:
            members, start = [], 0
            for name in names:
                path = f"model.layers.{i}.{part}.{name}"
                rows, width = model.get_submodule(path).weight.shape
                members.append(Member(path, start, start + rows, False))
                start += rows
            recipe = settings.recipe_of(members[0].name)
            layout = buffer_layout(recipe, start, width, recipe.group_size, torch.bfloat16, False)
            install_group(model, WushGroup(members, recipe, recipe.group_size, random_buffers(layout, recipe.format)))
        for name in EXPERTS:
            path = f"model.layers.{i}.mlp.experts.{name}"
            experts, rows, width = model.get_parameter(path).shape
            recipe = settings.recipe_of(path)
            layout = buffer_layout(recipe, rows, width, recipe.group_size, torch.bfloat16, False, experts)
            buffers = random_buffers(layout, recipe.format)
            ExpertGroup([Member(path, 0, rows, False)], recipe, recipe.group_size, buffers).install(model)


def random_buffers(layout: dict, format: str) -> dict[str, torch.Tensor | None]:
    """Buffers of random bytes: weights of about 0.02, orthogonal-sized transforms."""
    buffers: dict[str, torch.Tensor | None] = {}
    for name, what in layout.items():
        if what is None:
            buffers[name] = None
            continue
        size, dtype = what
        if name == "weight_packed":
            buffers[name] = torch.randint(0, 256, size, dtype=torch.uint8, device=end_to_end.DEVICE)
        elif name == "weight_scale":
            low, high = (118, 121) if format == "mxfp4" else (1, 20)
            buffers[name] = torch.randint(low, high, size, dtype=torch.uint8, device=end_to_end.DEVICE)
        elif name == "input_transform":
            buffers[name] = (torch.randn(size, device=end_to_end.DEVICE) / size[-1] ** 0.5).to(dtype)
        elif name == "input_feedback":
            buffers[name] = (0.1 * torch.randn(size, device=end_to_end.DEVICE)).bfloat16()
        else:
            buffers[name] = torch.ones(size, dtype=dtype, device=end_to_end.DEVICE)
    return buffers
