"""Text generation with a compiled quantized model: one graph for the prompt, one for every further token.

python examples/compile_generate.py [CHECKPOINT]     # default: a tiny random model
"""

import sys
import time

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import wush_compile as wc


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
            pad_token_id=0,
        ),
        dtype=torch.bfloat16,
    ).eval()
    return wc.quantize(model, solver="rtn", transform="hadamard", progress=False)


def main(checkpoint: str | None = None) -> None:
    model = tiny() if checkpoint is None else wc.load(checkpoint)
    ids = torch.randint(3, model.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 24, "do_sample": False}
    eager = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)

    # On a GPU, CUDA graphs remove the launch cost of a step. On a CPU, the option makes Inductor round as eager does.
    gpu = torch.cuda.is_available()
    how = {"mode": "reduce-overhead"} if gpu else {"mode": None, "options": {"emulate_precision_casts": True}}
    config = CompileConfig(backend="wush", fullgraph=True, **how)
    config._compile_all_devices = True  # transformers leaves CPUs in eager mode unless told otherwise
    for run in ("compiling", "compiled"):
        start = time.perf_counter()
        tokens = model.generate(ids, cache_implementation="static", compile_config=config, **settings)
        print(f"{run}: {time.perf_counter() - start:.2f} s, tokens of eager: {torch.equal(tokens, eager)}")
    print(tokens[0].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
