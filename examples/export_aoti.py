"""A quantized model as one file that runs without Python: export, fuse, package.

    python examples/export_aoti.py model.pt2 [cuda]
    P=$(python -c "import torch; print(torch.utils.cmake_prefix_path)")
    cmake -S examples/export_aoti -B build -DCMAKE_PREFIX_PATH=$P
    cmake --build build && ./build/host model.pt2 12 7 42

The package holds tensor arithmetic and, for a GPU, compiled kernels. Running it needs libtorch, not wush_compile.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import wush_compile as wc


class Logits(nn.Module):
    """input_ids [B, S] -> logits [B, S, vocabulary]: tensors in, tensors out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def main(path: str = "model.pt2", device: str = "cpu") -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model = Logits(wc.quantize(model, solver="rtn", transform="hadamard", progress=False)).to(device)

    ids = torch.randint(97, (2, 9), device=device)
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (ids,), dynamic_shapes=(any_size,))
        program = wc.fuse(program, inline=True)
        torch._inductor.aoti_compile_and_package(
            program, package_path=path, inductor_configs={"emulate_precision_casts": True}
        )
        packaged = torch._inductor.aoti_load_package(path)
        expected, actual = model(ids), packaged(ids)
    difference = (actual - expected).float().norm() / expected.float().norm()
    print(f"{path}: relative difference from eager {difference:.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
