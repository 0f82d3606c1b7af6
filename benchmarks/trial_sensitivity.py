"""Trial: what rounding a layer's input costs the KL, by what stands for S_b in T and by T's factor (docs/spec.md §2).

    python benchmarks/trial_sensitivity.py --data FOLDER --out trial.json                      # SmolLM2-135M-Instruct
    python benchmarks/trial_sensitivity.py --data FOLDER --model DIRECTORY --encoder --out trial.json   # a BERT

Some layers' inputs x and gradients γ of the log-likelihood of sampled predictions are kept, of sequences of WikiText-2
valid. T comes from the even sequences and is measured on the odd ones, and the other way round. The cost is the sum
of `(γᵀe)²` with the error e of rounding x in 4 bits: twice what this part of the layer costs the KL. Costs are
relative to `weights`, T by the weights alone. `capped` bounds a token's cost by that of one in 200: single tokens
weigh a lot.

    weights      S_b = W_bᵀW_b / N
    gradients    Σ ‖x‖² γ γᵀ stands for it
    factor       and T has the factor that spares the tokens of largest ‖x‖ ‖γ‖ (MXFP4)
"""

import argparse
from pathlib import Path

import common
import torch
from torch import Tensor, nn

import wush_compile as wc
from wush_compile import formats
from wush_compile.calibration.token_weights import LARGEST_WEIGHT, POWER
from wush_compile.data import windows
from wush_compile.solver import sensitivity
from wush_compile.solver.choose import Transforms
from wush_compile.solver.solve import input_global_scale


def groups_of(model: nn.Module, layers: list[int], encoder: bool) -> dict[str, list[nn.Linear]]:
    """The linears of some layers that read the same tensor, by a name."""
    found = {}
    for i in layers:
        if encoder:
            layer = model.encoder.layer[i]
            own, out = layer.attention.self, layer.attention.output
            mlp = {"up": [layer.intermediate.dense], "down": [layer.output.dense]}
            parts = {"qkv": [own.query, own.key, own.value], "o": [out.dense], **mlp}
        else:
            own, mlp = model.model.layers[i].self_attn, model.model.layers[i].mlp
            parts = {"qkv": [own.q_proj, own.k_proj, own.v_proj], "o": [own.o_proj]}
            parts |= {"gate-up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}
        found |= {f"{i} {name}": members for name, members in parts.items()}
    return found


def collect(model: nn.Module, ids: list[Tensor], groups: dict[str, list[nn.Linear]], encoder: bool) -> dict:
    """{name: (x [n, K], g of all members' outputs [n, N])} in the model's dtype."""
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        kept.setdefault(name, []).append(value.detach().flatten(0, -2).clone())

    for name, members in groups.items():
        members[0].register_forward_pre_hook(lambda _, args, name=name: keep(f"{name} x", args[0]))
        for i, member in enumerate(members):

            def hook(_, args, output, key=f"{name} {i}"):
                output.register_hook(lambda gradient: keep(key, gradient))

            member.register_forward_hook(hook)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that gradients reach every layer
    torch.manual_seed(0)
    for batch in ids:
        if encoder:
            outputs = model(input_ids=batch)
            results = [outputs.last_hidden_state.float(), outputs.pooler_output.float()]
            likelihood = sum((result * torch.randn_like(result)).sum() for result in results)
        else:
            logits = model(input_ids=batch).logits.flatten(0, -2).float()
            sampled = torch.multinomial(logits.detach().softmax(-1), 1)
            likelihood = logits.log_softmax(-1).gather(-1, sampled).sum()
        likelihood.backward()
        model.get_input_embeddings().weight.grad = None
    joined = {name: torch.cat(parts) for name, parts in kept.items()}
    return {
        name: (joined[f"{name} x"], torch.cat([joined[f"{name} {i}"] for i in range(len(members))], 1))
        for name, members in groups.items()
    }


def costs(x: Tensor, g: Tensor, w: Tensor, format: str, fold: Tensor) -> dict[str, Tensor]:
    """(γᵀe)² of each token [n], by the setting. x [n, K]; g [n, N]; w [N, K]; fold [n]: 0 or 1."""
    recipe, back, found = wc.WushConfig(format=format, activation_rounding="nearest").recipe, g @ w, {}
    block = recipe.group_size
    for own in (0, 1):
        rows, gradient, other = x[fold == own], back[fold == own], x[fold != own]
        weight = g[fold == own].norm(dim=1) ** POWER
        weight = (weight / weight.mean()).clamp(max=LARGEST_WEIGHT)
        h = ((rows * weight[:, None]).T @ rows).double() / len(rows)
        seen = sensitivity.Sensitivity.of(rows, gradient, len(rows), block)
        for name, used, factors in (("weights", None, 1), ("gradients", seen, 1), ("factor", seen, 8)):
            sensitivity.FACTORS = factors
            t, _ = Transforms(recipe, h, block, torch.bfloat16, "layer", used).all(w.T.double(), None)
            scale = input_global_scale(recipe, h, rows[:2048], t, block, x.device, "layer", {})
            values = (other.unflatten(-1, (-1, block)).transpose(0, 1) @ t.float().mT).contiguous()  # [K/B, n, B]
            rounded = formats.dequantize(*formats.quantize(values, format, "mse", scale), format, scale)
            error = ((rounded - values) @ torch.linalg.inv(t.float()).mT).transpose(0, 1).flatten(1)
            found.setdefault(name, []).append((error * back[fold != own]).sum(1).square())
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt")
    parser.add_argument("--model", type=Path, help="GGUF file or model directory; SmolLM2's is fetched when left out")
    parser.add_argument("--encoder", action="store_true", help="the model is a BERT")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 18, 26])
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--tokens", type=int, default=15360)
    parser.add_argument("--out", type=Path, default=Path("trial_sensitivity.json"))
    args = parser.parse_args()
    device, length = common.device("auto"), 128 if args.encoder else 512
    if args.encoder:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(args.model, dtype=torch.bfloat16).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = common.load_smollm2(args.model, device)
    text = windows(common.wikitext(args.data, "valid"), tokenizer, length, args.tokens // length)
    groups = groups_of(model, args.layers, args.encoder)
    seen = collect(model, torch.cat(text).to(device).split(512 // length), groups, args.encoder)
    result = {**common.environment(device), "tokens": args.tokens, "rows": []}
    with torch.no_grad():
        for name, members in groups.items():
            x, g = (value.float() for value in seen.pop(name))
            w = torch.cat([member.weight for member in members]).float()
            fold = torch.arange(len(x), device=device) // length % 2
            for format in args.formats:
                found = costs(x, g, w, format, fold)
                base, cap = found["weights"], found["weights"].quantile(0.995)
                row = {"format": format, "group": name}
                for key in ("gradients", "factor"):
                    whole, capped = (
                        found[key].sum() / base.sum(),
                        found[key].clamp(max=cap).sum() / base.clamp(max=cap).sum(),
                    )
                    row[key] = [round(float(whole), 3), round(float(capped), 3)]
                result["rows"].append(row)
                print(row, flush=True)
                common.write_json(args.out, result)
    for format in args.formats:
        own = [row for row in result["rows"] if row["format"] == format]
        for key in ("gradients", "factor"):
            mean = torch.tensor([row[key] for row in own]).log().mean(0).exp()
            print(format, key, "geometric mean: {:.3f}, capped {:.3f}".format(*mean.tolist()))


if __name__ == "__main__":
    main()
