"""Perplexity, comparison and layer losses against plain float64 computations of the same."""

import math

import pytest
import torch
from models import VOCABULARY, plain, tokens
from torch import nn

from wush_compile import WushConfig
from wush_compile import evaluation as evaluate
from wush_compile.errors import ConfigError, DataError
from wush_compile.evaluation import language, layers


class Bigram(nn.Module):
    """A language model outside transformers: its logits depend on the last token alone, and come as a tensor."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.dropout = nn.Dropout(0.9)

    def forward(self, ids):
        return self.dropout(self.table[ids])


def text(length: int) -> torch.Tensor:
    return tokens(1, length, seed=length)[0]


def oracle(reference, model, ids, window):
    """(kl, top1, perplexity, reference perplexity) from whole windows in float64."""
    kl, same, losses = [], [], [[], []]
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        with torch.no_grad():
            logits = [m(piece[None]) for m in (reference, model)]
        p, q = ((x if isinstance(x, torch.Tensor) else x.logits)[0, :-1].double().log_softmax(-1) for x in logits)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        for loss, log in zip(losses, (q, p), strict=True):
            loss.append(-log[torch.arange(window - 1), piece[1:]])
    return (torch.cat(kl).mean(), torch.cat(same).double().mean(), *(torch.cat(x).mean().exp() for x in losses))


def check(result, expected):
    measured = (result.kl, result.top1, result.perplexity, result.reference_perplexity)
    assert measured == pytest.approx([float(x) for x in expected], rel=2e-5)


@pytest.mark.parametrize("length, window", [(57, 8), (16, 8), (33, 33), (9, 2)])
def test_compare_is_the_definition(length, window):
    reference, model = Bigram(0).eval(), Bigram(1).eval()
    ids = text(length)
    result = evaluate.compare(reference, model, ids, window, progress=False)
    check(result, oracle(reference, model, ids, window))
    assert result.predictions == length // window * (window - 1)
    assert evaluate.perplexity(model, ids, window, progress=False) == pytest.approx(result.perplexity, rel=1e-9)
    assert evaluate.kl_divergence(reference, model, ids[None], window, progress=False) == result.kl


def test_chunks_of_positions_change_nothing_but_memory(monkeypatch):
    reference, model, ids = Bigram(0).eval(), Bigram(1).eval(), text(40)
    whole = evaluate.compare(reference, model, ids, 20, progress=False)
    monkeypatch.setattr(language, "CHUNK_LOGITS", 7 * VOCABULARY)
    check(
        evaluate.compare(reference, model, ids, 20, progress=False),
        (whole.kl, whole.top1, whole.perplexity, whole.reference_perplexity),
    )


def test_a_transformers_model_in_bf16():
    reference, model = plain("llama"), plain("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    ids = text(48)
    check(evaluate.compare(reference, model, ids, 16, progress=False), oracle(reference, model, ids, 16))
    same = evaluate.compare(reference, reference, ids, 16, progress=False)
    assert same.kl == 0 and same.top1 == 1 and same.perplexity == same.reference_perplexity


def test_a_short_text_is_one_window_and_a_rest_is_left_out():
    model = Bigram(2).eval()
    assert evaluate.compare(model, model, text(5), 2048, progress=False).predictions == 4
    assert evaluate.compare(model, model, text(19), 8, progress=False).predictions == 14
    assert evaluate.perplexity(model, text(19), 8, progress=False) == evaluate.perplexity(
        model, text(19)[:16].tolist(), 8, progress=False
    )


def test_impossible_tokens_cost_nothing_where_the_reference_excludes_them_too():
    reference, model = Bigram(0), Bigram(1)
    with torch.no_grad():
        reference.table[:, 0] = model.table[:, 0] = -math.inf
    assert math.isfinite(evaluate.kl_divergence(reference, model, text(20), 10, progress=False))


def test_models_keep_their_modes_and_are_measured_without_dropout():
    model = Bigram(3)
    model.train()
    model.dropout.eval()
    model.dropout.training, model.training = True, False
    first = evaluate.perplexity(model, text(30), 10, progress=False)
    assert first == evaluate.perplexity(model, text(30), 10, progress=False)
    assert model.dropout.training and not model.training


@pytest.mark.parametrize(
    "ids, window, message",
    [
        (torch.tensor([3]), 8, "holds 1 tokens: give at least 2"),
        (torch.tensor([], dtype=torch.int64), 8, "holds 0 tokens"),
        (text(8), 1, "window is 1"),
        (torch.randn(8), 8, r"float32 \[8\]: give integers of shape \[T\]"),
        (tokens(2, 8), 8, r"int64 \[2, 8\]"),
        (torch.tensor([1, VOCABULARY, 2]), 8, f"token_ids holds token id {VOCABULARY}, but the model's vocabulary has"),
        (torch.tensor([1, -5]), 8, "token id -5"),
    ],
)
def test_bad_tokens_are_named(ids, window, message):
    with pytest.raises(DataError, match=message):
        evaluate.perplexity(plain("llama"), ids, window, progress=False)


# -- layer losses ----------------------------------------------------------------------------------------------------

LAYERS = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def captured(model, batches, name):
    """All rows of a linear's input, fp32 [n, K]."""
    rows = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1).float()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(rows), linear.weight.detach()


def test_layer_loss_is_equation_1_on_all_rows():
    from wush_compile.solver.loss import layer_loss
    from wush_compile.solver.solve import solve

    model, batches = plain("llama"), [tokens(2, 24, seed=s) for s in range(4)]
    configs = [WushConfig(solver="rtn", transform="hadamard"), WushConfig()]
    result = evaluate.compare_layers(model, batches, LAYERS, configs, progress=False)
    assert list(result.loss) == LAYERS
    assert list(result.loss[LAYERS[0]]) == ["hadamard rtn", "wush gptq"]
    for name in LAYERS:
        rows, weight = captured(model, batches, name)
        for config, title in zip(configs, result.loss[name], strict=True):
            solution = solve(weight, config, moment=rows.T @ rows, count=len(rows), sample=rows, name=name)
            expected, relative = layer_loss(rows, weight, solution, config)
            assert result.loss[name][title] == pytest.approx(expected, rel=0.02)
            assert result.relative[name][title] == pytest.approx(relative, rel=0.02)
    assert str(result).count("\n") == 3 and "| wush gptq |" in str(result).splitlines()[0]
    assert result.to_dict() == {"loss": result.loss, "relative": result.relative}


def test_layer_loss_ignores_masked_positions():
    model, ids = plain("llama"), tokens(2, 24)
    padded = torch.cat((ids, torch.full((2, 5), 3)), dim=1)
    mask = torch.cat((torch.ones(2, 24), torch.zeros(2, 5)), dim=1)
    config = {"one": WushConfig(solver="rtn")}
    apart = [ids[:1], ids[1:]]
    assert evaluate.compare_layers(
        model, [{"input_ids": padded, "attention_mask": mask}], LAYERS, config, progress=False
    ) == (evaluate.compare_layers(model, apart, LAYERS, config, progress=False))


def test_layer_loss_counts_no_position_of_a_mask_with_holes():
    model, mask = plain("llama"), torch.ones(2, 24, dtype=torch.int64)
    mask[:, 5:9] = 0
    batch = {"input_ids": tokens(2, 24), "attention_mask": mask}
    state = layers._observe(model, [batch], {n: model.get_submodule(n) for n in LAYERS}, progress=False)
    assert [int(count) for _, count, _ in state.values()] == [40, 40]


def test_layer_loss_of_any_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    result = evaluate.compare_layers(
        model, [torch.randn(100, 64)], ["0", "2"], [WushConfig(format="nvfp4")], progress=False
    )
    assert all(0 < row["wush"] < 0.1 for row in result.relative.values())


def test_bad_columns_and_layers_are_named():
    model, data = plain("llama"), [tokens(1, 8)]
    with pytest.raises(ConfigError, match=r"unknown linear layer .*did you mean 'model.layers.0.mlp.up_proj'"):
        evaluate.compare_layers(model, data, ["model.layers.0.mlp.up_prj"], [WushConfig()])
    with pytest.raises(DataError, match="same configuration"):
        evaluate.compare_layers(model, data, LAYERS, [WushConfig(), WushConfig()])
    with pytest.raises(DataError, match="at least one layer"):
        evaluate.compare_layers(model, data, [], [WushConfig()])


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_measures():
    reference, model, ids = Bigram(0).eval(), Bigram(1).eval(), text(400)
    expected = evaluate.compare(reference, model, ids, 16, progress=False)
    check(
        evaluate.compare(reference.cuda(), model.cuda(), ids, 16, progress=False),
        (expected.kl, expected.top1, expected.perplexity, expected.reference_perplexity),
    )
