"""Linears that inference servers run as one, which a checkpoint must quantize together or not at all."""

from .record import Quantization

# name of the fused linear -> the linears on disk. vLLM's model classes name more of their own.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def half_quantized(record: Quantization) -> list[list[str]]:
    """For each fused linear that is quantized in part: its linears that are not."""
    quantized = {name for group in record.groups for name in group["members"]}
    found = {}
    for name in sorted(quantized):
        parent, dot, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            left = [f"{parent}{dot}{other}" for other in leaves]
            left = [other for other in left if other not in quantized and other in record.ignored]
            if leaf in leaves and left:
                found[f"{parent}{dot}{fused}"] = left
    return list(found.values())
