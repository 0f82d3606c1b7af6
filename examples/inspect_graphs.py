"""What the compile backend does to a model, step by step.

python examples/inspect_graphs.py [DIRECTORY]        # also saves each step there as a file, for `diff`
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import wush_compile as wc


def main(directory: str | None = None) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        dtype=torch.bfloat16,
    ).eval()
    model = wc.quantize(model, solver="rtn", transform="hadamard", progress=False)

    compiled = torch.compile(model, backend="wush")
    with wc.trace_graphs() as log, torch.no_grad():
        compiled(torch.randint(97, (2, 9)), use_cache=False)

    graph = log.graphs[0]
    for step in graph.snapshots:
        print(f"{step.step:<18}{dict(step.counts)}")
    print("\nthe decoder layer after fuse_norm\n" + graph.text(after="fuse_norm", layer=0))
    print("\nwhat Inductor runs\n" + "\n".join(graph.kernels))
    if directory is not None:
        log.save(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
