"""What 4 bits cost mixtures of experts that are made of SmolLM2-135M-Instruct, on WikiText-2: KL to the model in bf16.

    python benchmarks/moe_accuracy.py --data FOLDER --out moe_accuracy.json
    python benchmarks/moe_accuracy.py --data FOLDER --models exact --formats mxfp4 --rows wush

FOLDER holds valid.txt and test.txt of WikiText-2 raw. The models, each compared with itself in bf16:

    dense    SmolLM2 as it is
    exact    4 experts, all of which see every token: expert e holds a quarter of the channels between gate, up and
             down, and 4 times the columns of down. It computes what the dense model computes.
    sparse   8 experts, of which a random router chooses 2 for a token. Every expert holds the 1024 channels that matter
             most and an eighth of the other 512, so that it is still a language model, whose experts see other tokens.
"""

import argparse
import copy
import gc
import sys
import time
from pathlib import Path

import common
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.evaluation.language import compare

CALIBRATION_BATCH = 8
TEST_WINDOW = 2048
# (experts, experts a token, channels that all experts hold); None for the dense model
MODELS = {"dense": None, "exact": (4, 4, 0), "sparse": (8, 2, 1024)}
ROWS = {
    "wush": ("GPTQ, WUSH (the default)", {}),
    "hadamard": ("GPTQ, Hadamard", {"transform": "hadamard"}),
    "rtn": ("RTN, no transform", {"solver": "rtn", "transform": "identity"}),
}


@torch.no_grad()
def importance(dense: torch.nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """What each channel between gate, up and down adds to the output of its layer, squared: [I] a layer."""
    found, handles = [], []
    for layer in dense.model.layers:

        def see(down, args):
            found.append(args[0].float().square().mean((0, 1)) * down.weight.float().square().sum(0))

        handles.append(layer.mlp.down_proj.register_forward_pre_hook(see))
    dense.model(batch.to(dense.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def mixture_of(dense: torch.nn.Module, experts: int, each: int, core: int, batch: torch.Tensor) -> torch.nn.Module:
    """A Mixtral with the weights of a Llama, whose experts hold `core` channels all and a part of the others each.

    The `core` channels are those that matter most on `batch`. If each token goes to all experts, the router is zero,
    and without a core the mixture computes what the dense model computes. Otherwise the router is random.
    """
    own = dense.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id")
    names += ("eos_token_id", "pad_token_id", "hidden_act")
    settings = {name: copy.deepcopy(getattr(own, name)) for name in names if hasattr(own, name)}
    part = (own.intermediate_size - core) // experts
    config = MixtralConfig(
        **settings,
        intermediate_size=core + part,
        num_local_experts=experts,
        num_experts_per_tok=each,
        sliding_window=None,
    )
    model = MixtralForCausalLM._from_config(config, dtype=dense.dtype).to(dense.device).eval()
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    generator = torch.Generator().manual_seed(0)
    for i, (layer, power) in enumerate(zip(dense.model.layers, importance(dense, batch), strict=True)):
        order = power.argsort(descending=True) if core else torch.arange(own.intermediate_size, device=dense.device)
        parts = [torch.cat((order[:core], rest)) for rest in order[core:].split(part)]  # channels of each expert
        gate, up, down = (w.weight for w in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
        # The weights of a token's experts sum to 1: what all hold counts once, the rest `each` times its weight.
        scale = torch.cat((torch.ones(core), torch.full((part,), float(each)))).to(down)
        router = torch.zeros(experts, own.hidden_size)
        if each < experts:
            router = 0.01 * torch.randn(router.shape, generator=generator)
        prefix = f"model.layers.{i}.mlp"
        state[f"{prefix}.gate.weight"] = router.to(down)
        state[f"{prefix}.experts.gate_up_proj"] = torch.stack(
            [torch.cat((gate[channels], up[channels])) for channels in parts]
        )
        state[f"{prefix}.experts.down_proj"] = torch.stack([down[:, channels] * scale for channels in parts])
    model.load_state_dict(state)
    model.tie_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, help="JSON file, written after each row")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=32, help="windows of 2048 tokens; 0 for the whole text")
    parser.add_argument("--layers", type=int, help="only the first layers of SmolLM2, for a quick trial")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    where = common.device(args.device)
    dense, tokenizer = common.load_smollm2(args.model, where)
    if args.layers is not None:
        dense.model.layers = dense.model.layers[: args.layers]
        dense.config.num_hidden_layers = args.layers
    text = {split: common.wikitext(args.data, split) for split in ("valid", "test")}
    calibration = torch.cat(windows(text["valid"], tokenizer, args.calibration_length, args.calibration_windows))
    test = torch.cat(windows(text["test"], tokenizer, TEST_WINDOW, args.test_windows or None), dim=1)
    result = {
        **common.environment(where),
        "calibration": f"{args.calibration_windows} windows of {args.calibration_length} tokens of WikiText-2 valid",
        "test": f"{test.shape[1] // TEST_WINDOW} windows of {TEST_WINDOW} tokens of WikiText-2 test",
        "rows": {},
    }
    print(", ".join(f"{key}: {value}" for key, value in result.items() if key != "rows"))
    print("\n| | bf16 | perplexity | KL | top-1 % | quantize s |\n|---|---|---|---|---|---|")
    for kind in args.models:
        reference = dense if MODELS[kind] is None else mixture_of(dense, *MODELS[kind], calibration[:4])
        for format in args.formats:
            for name in args.rows:
                title, settings = ROWS[name]
                model, start = copy.deepcopy(reference), time.perf_counter()
                data = list(calibration.split(CALIBRATION_BATCH))
                wc.quantize(model, data, format=format, **settings, progress=sys.stderr.isatty())
                seconds = time.perf_counter() - start
                row = compare(reference, model, test, TEST_WINDOW, progress=False).to_dict()
                key = f"{kind} {format} {name}"
                result["rows"][key] = {"title": title, **row, "quantize_seconds": seconds}
                common.write_json(args.out, result)
                print(
                    f"| {kind}, {format}, {title} | {row['reference_perplexity']:.2f} | {row['perplexity']:.2f} | "
                    f"{row['kl']:.4f} | {100 * row['top1']:.1f} | {seconds:.0f} |",
                    flush=True,
                )
                del model
                gc.collect()


if __name__ == "__main__":
    main()
