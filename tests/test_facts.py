"""What kernels remember of a weight follows the weight, and CUDA graphs that were captured follow too."""

import gc
import weakref

import pytest
import torch
from torch import nn

from wush_compile import formats
from wush_compile.errors import WushError
from wush_compile.kernels import facts
from wush_compile.kernels.triton.linear import launch
from wush_compile.modules import Member, WushGroup, buffer_layout
from wush_compile.recipe import Recipe

gpu = pytest.mark.gpu


def largest(t):
    return t.amax(-1)


def small(t):
    return bool((t < 100).all())


def both(t):
    return largest(t), small(t)


def ask(t):
    return facts.remembered(t, "both", both, lambda t: (largest(t), False))


@pytest.fixture
def weight():
    return torch.randint(1, 90, (6, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def capturing(monkeypatch):
    """Calls it to say whether a CUDA graph is captured."""

    def say(now: bool) -> None:
        monkeypatch.setattr(facts, "capturing", lambda t: now)

    facts._warn_capturing.cache_clear()
    return say


def test_facts_are_renewed_in_their_memory(weight):
    top, fits = ask(weight)
    assert ask(weight)[0] is top and fits
    weight[2, 3] = 99
    again, _ = ask(weight)
    assert again is top and torch.equal(top, largest(weight))
    part, _ = ask(weight[3:])
    assert part.shape == (3,) and ask(weight)[0] is top  # each dense part of a storage has its own


def test_refresh_sees_what_has_no_version(weight):
    """vLLM copies to `param.data`, which leaves the version of `param` alone; tensors of inference mode have none."""
    param = nn.Parameter(weight, requires_grad=False)
    with torch.inference_mode():
        top, part = ask(param)[0], ask(param[3:])[0]
    param.data.copy_(param.flip(0) + 1)
    assert not torch.equal(ask(param)[0], largest(param))
    facts.refresh([param])
    assert torch.equal(top, largest(param)) and torch.equal(part, largest(param[3:]))
    assert ask(param)[0] is top and ask(param[3:])[0] is part


def test_refresh_computes_once(weight, monkeypatch):
    calls = []
    facts.remembered(weight, "counted", lambda t: calls.append(t) or largest(t), largest)
    facts.refresh([weight, weight[2:], weight.view(-1)])
    facts.remembered(weight, "counted", largest, largest)
    assert len(calls) == 2


def test_memory_that_is_freed_and_brought_back(weight):
    top, _ = ask(weight)
    kept, storage = weight.clone(), weight.untyped_storage()
    storage.resize_(0)
    facts.refresh([weight])  # nothing is there to compute from
    storage.resize_(kept.nbytes)
    weight.copy_(kept.flip(0))
    assert ask(weight)[0] is top and torch.equal(top, largest(weight))


def test_a_write_makes_a_weight_unsettled(weight):
    assert not facts.mark_used_and_were_settled(weight) and facts.mark_used_and_were_settled(weight)
    ask(weight)
    facts.refresh([weight])
    assert not facts.mark_used_and_were_settled(weight) and facts.mark_used_and_were_settled(weight)


def test_weights_of_one_call_are_settled_in_the_second(weight):
    """The second call is what a CUDA graph captures."""
    scales = weight[:, :4].clone()
    assert not facts.mark_used_and_were_settled(weight, scales)
    assert facts.mark_used_and_were_settled(weight, scales)
    scales[0] = 1
    assert not facts.mark_used_and_were_settled(weight, scales)
    assert facts.mark_used_and_were_settled(weight, scales)


def test_nothing_is_kept_of_a_capture(weight, capturing, caplog):
    capturing(True)
    first, fits = ask(weight)
    assert torch.equal(first, largest(weight)) and not fits
    assert ask(weight)[0] is not first
    assert sum("while a CUDA graph is captured" in r.message for r in caplog.records) == 1
    capturing(False)
    top, fits = ask(weight)
    assert fits and top is not first
    capturing(True)
    assert ask(weight) == (top, True) or ask(weight)[0] is top
    weight[0] = 5
    assert ask(weight)[0] is not top  # written, and not yet looked at


def test_an_answer_that_a_graph_relies_on_must_stay(weight, capturing, caplog):
    ask(weight)
    capturing(True)
    ask(weight)
    capturing(False)
    weight[1] = 7
    facts.refresh([weight])
    assert not caplog.records
    weight[1] = 200
    with pytest.raises(WushError, match="capture the graphs again"):
        facts.refresh([weight])
    weight[1] = 7
    ask(weight)
    weight[1] = 200
    assert ask(weight)[1] is False and "capture the graphs again" in caplog.records[-1].message


def test_an_answer_that_no_graph_relies_on_may_change(weight):
    ask(weight)
    weight[1] = 200
    facts.refresh([weight])
    assert ask(weight)[1] is False


def test_facts_end_with_the_weight(weight):
    weight = weight.clone()
    top = weakref.ref(ask(weight)[0])
    del weight
    gc.collect()
    assert top() is None


# -- modules ---------------------------------------------------------------------------------------------------------


def group(format: str, rows: int, width: int, seed: int, device: str = "cpu", octaves: int = 0) -> WushGroup:
    """Two linears of one group, of random weights whose rows span different ranges."""
    recipe = Recipe(format=format, transform="identity", activation_scale_rule="absmax", weight_scale_rule="absmax")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight *= torch.exp2(torch.randint(-9, 9, (rows, 1), generator=generator).float())
    if octaves:
        weight[:, :32] *= 2.0**octaves
    codes, scales = formats.quantize(weight, format, "absmax")
    layout = buffer_layout(recipe, rows, width, 32, torch.bfloat16, False)
    buffers = {name: None if of is None else torch.ones(of[0], dtype=of[1]) for name, of in layout.items()}
    buffers |= {"weight_packed": codes, "weight_scale": scales}
    members = [Member("a", 0, rows // 2, False), Member("b", rows // 2, rows, False)]
    return WushGroup(members, recipe, 32, buffers).to(device)


def test_a_state_dict_renews_the_facts():
    of, other = group("mxfp4", 64, 256, 0), group("mxfp4", 64, 256, 1)
    top = ask(of.weight_scale)[0], ask(of.weight_scale[32:])[0]
    of.load_state_dict(other.state_dict())
    assert torch.equal(top[0], largest(other.weight_scale)) and torch.equal(top[1], largest(other.weight_scale[32:]))


# -- on a GPU: as vLLM runs a model, captures it, lets it sleep, and loads weights again ------------------------------


def call(of: WushGroup, x: torch.Tensor) -> torch.Tensor:
    """Both linears, in vLLM's inference mode."""
    with torch.inference_mode():
        return torch.cat([of(x, member.start, member.stop) for member in of.members], dim=-1)


def outside_the_pools() -> int:
    """Bytes in use that belong to no graph."""
    return sum(s["allocated_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == (0, 0))


def capture(run) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, int]:
    """(graph, what `run` gives in it, bytes that the capture took outside of its pool)."""
    torch.cuda.synchronize()
    gc.collect()
    graph, before = torch.cuda.CUDAGraph(), outside_the_pools()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out, outside_the_pools() - before


def captured(of: WushGroup, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    call(of, x)  # the profile run
    _, _, least = capture(lambda: x.clone())  # PyTorch keeps a generator's state for each graph
    graph, out, taken = capture(lambda: call(of, x))
    assert taken == least
    return graph, out


def replayed(graph: torch.cuda.CUDAGraph, out: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out.fill_(float("nan"))
        graph.replay()
        return out.clone()


FORMATS = pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
ROWS = pytest.mark.parametrize("rows", [1, 4, 16, 128, 1100])


@gpu
def test_a_graph_captured_in_the_second_call_starts_its_products_early(monkeypatch):
    """`torch.compile(mode="reduce-overhead")` runs a model once, then captures it."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no early start on this GPU")
    seen, mark = [], launch.mark_used_and_were_settled
    monkeypatch.setattr(launch, "mark_used_and_were_settled", lambda *weights: seen.append(mark(*weights)) or seen[-1])
    of, x = group("mxfp4", 64, 256, 0, "cuda"), torch.randn(1, 256, device="cuda").bfloat16()
    call(of, x)
    capture(lambda: call(of, x))
    assert seen == [False, False, True, True]  # two products a call


@gpu
@FORMATS
@ROWS
def test_a_graph_replays_with_weights_that_are_loaded_again(format, rows):
    size = (512, 1024)
    of, other = group(format, *size, 0, "cuda"), group(format, *size, 1, "cuda")
    x = torch.randn(rows, size[1], device="cuda").bfloat16()
    want = [call(of, x), call(other, x)]
    graph, out = captured(of, x)
    assert torch.equal(replayed(graph, out), want[0])
    states = [{n: t.clone() for n, t in g.state_dict().items()} for g in (of, other)]
    for turn in (1, 0, 1):  # as vLLM does it: no version changes
        for name, t in of.named_buffers():
            t.data.copy_(states[turn][name])
        facts.refresh(of.buffers())
        assert torch.equal(replayed(graph, out), want[turn]), turn
        assert torch.equal(call(of, x), want[turn])
    of.load_state_dict(states[0])
    assert torch.equal(replayed(graph, out), want[0])


@gpu
@pytest.mark.parametrize("rows", [16, 128])
def test_without_a_refresh_the_old_facts_are_replayed(rows):
    """Shows that the test above can fail."""
    of, other = group("mxfp4", 512, 1024, 0, "cuda"), group("mxfp4", 512, 1024, 1, "cuda")
    x = torch.randn(rows, 1024, device="cuda").bfloat16()
    graph, out = captured(of, x)
    for (_, t), (_, new) in zip(of.named_buffers(), other.named_buffers()):
        t.data.copy_(new)
    assert not torch.equal(replayed(graph, out), call(other, x))


@gpu
@FORMATS
@ROWS
def test_a_graph_replays_after_sleep(format, rows):
    """The weights' memory holds something else for a while, at the same addresses, as in vLLM's sleep mode."""
    of = group(format, 512, 1024, 0, "cuda")
    x = torch.randn(rows, 1024, device="cuda").bfloat16()
    want = call(of, x)
    graph, out = captured(of, x)
    backup = {name: t.cpu() for name, t in of.named_buffers()}
    for t in of.buffers():
        t.untyped_storage().fill_(0xAB)
    for name, t in of.named_buffers():
        t.untyped_storage().copy_(backup[name].untyped_storage())
    assert torch.equal(replayed(graph, out), want) and torch.equal(call(of, x), want)


@gpu
def test_weights_of_a_wider_range_are_refused():
    """Many rows go to fp8 products, which a graph holds; fp8 has not the range of these scales."""
    of, other = group("mxfp4", 512, 1024, 0, "cuda"), group("mxfp4", 512, 1024, 1, "cuda", octaves=-20)
    x = torch.randn(4096, 1024, device="cuda").bfloat16()
    captured(of, x)
    with pytest.raises(WushError, match="capture the graphs again"):
        of.load_state_dict(other.state_dict())


@gpu
def test_experts_follow():
    from wush_compile.kernels.triton.common.memory import row_facts, scale_words

    scales = torch.randint(100, 120, (4, 64, 3), dtype=torch.uint8, device="cuda")
    top, words = row_facts(scales.flatten(0, 1)).top, scale_words(scales)
    scales.data.add_(1)
    facts.refresh([scales])
    assert torch.equal(top, scales.flatten(0, 1).amax(-1))
    assert torch.equal(words.view(torch.uint8)[..., :3], scales)
