"""A language model to 4 bits on both sides, saved, loaded and explained.

    python examples/quantize_llm.py MODEL_DIRECTORY TEXT_FILE OUT

Without arguments it quantizes a tiny random Llama on random tokens, which takes seconds anywhere.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import wush_compile as wc


def tiny() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), list(torch.randint(2, 256, (8, 1, 64)))


def main(arguments: list[str]) -> None:
    if arguments:
        source, text, out = arguments
        model, tokenizer = wc.load_model(source)
        data = wc.windows(Path(text).read_text(encoding="utf-8"), tokenizer, 512)[:128]
    else:
        (model, data), tokenizer, out = tiny(), None, str(Path(tempfile.mkdtemp()) / "checkpoint")

    model = wc.quantize(model, data, format="mxfp4")  # the same object, its linears in 4 bits
    print(wc.explain(model))

    wc.save(model, out, tokenizer=tokenizer)
    again = wc.load(out)
    prompt = data[0][:, :8]
    greedy = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, **greedy), again.generate(prompt, **greedy))
    print(f"\nsaved in {out}: the loaded model generates the same tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
