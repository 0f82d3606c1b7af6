"""The warm-up runs the kernels of a run, in threads, while the model is traced."""

import collections
import contextlib
import math
import threading
import time

import pytest
import torch
from models import plain, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import wush_compile as wc
from wush_compile.calibration import warm_up
from wush_compile.calibration.context import Run
from wush_compile.calibration.loop import calibrate
from wush_compile.calibration.ranks import SingleProcess
from wush_compile.calibration.tensors import ModelTensors
from wush_compile.calibration.warm_up import run_during, warm_up_tasks
from wush_compile.capture.export import capture
from wush_compile.data import normalize
from wush_compile.errors import NonFiniteError
from wush_compile.passes.calibration.group import find_groups
from wush_compile.phases import phase, timing

CPU = torch.device("cpu")


def tasks(model, batches, config, device=CPU, **settings):
    return list(warm_up_tasks(model, batches, config, Run(ModelTensors(model), device, **settings)))


@pytest.mark.parametrize(
    "config",
    [
        wc.WushConfig(token_weights="uniform"),
        wc.WushConfig(format="nvfp4", moments="conditional", token_weights="uniform"),
        wc.WushConfig(format="int4", solver="rtn", activation_scale_rule="absmax", token_weights="uniform"),
        wc.WushConfig(solver="rtn", transform="hadamard"),
        wc.WushConfig(transform="identity", token_weights="uniform"),
    ],
    ids=["mxfp4-wush", "nvfp4-conditional", "int4-rtn", "hadamard", "identity"],
)
@torch.no_grad()
def test_tasks_make_the_calls_of_a_run(config):
    """Op by op: the same shapes, dtypes, formats and rules, each call once; a moment of one width stands for all."""
    model, batches = plain("llama"), [{"input_ids": window} for window in tokens(6, 16).split(2)]
    work = tasks(model, batches, config, batch_size=6)
    # q and o, k and v, gate and up, down; and one group is solved. The head is not quantized.
    assert len(work) == 4 + 1
    with Calls(torch.bfloat16) as warm:
        for task in work:
            task()

    windows = normalize(batches, model=model)
    captured = capture(model, windows)
    groups, _ = find_groups(captured.graph_module, model, config)
    with Calls(torch.bfloat16) as real:
        calibrate(captured, groups, windows, Run(ModelTensors(model), CPU, batch_size=6))
    # What observes a stage does not multiply by its last linear. The pass that weighs tokens does.
    last = ((96, 128), torch.bfloat16), ((128, 64), torch.bfloat16)
    for op, more in (("aten::mm", {last}), ("wush::transform_quantize", set()), ("wush::fp4_linear", set())):
        assert set(warm.seen[op]) == set(real.seen[op]) | more, op
        assert len(warm.seen[op]) == 4, op  # one for each kind of linear
    assert len(warm.seen["wush::observe"]) == 1 and set(warm.seen["wush::observe"]) < set(real.seen["wush::observe"])


class Calls(TorchDispatchMode):
    """Op -> the arguments of its calls on a first tensor of `dtype` or of codes; leading dimensions count as one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first, self.seen = (dtype, torch.uint8), collections.defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype in self.first:
            self.seen[func.name()].append(tuple(map(self.described, args)))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def described(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        return (math.prod(argument.shape[:-1]), *argument.shape[-1:]), argument.dtype


@pytest.mark.parametrize("in_memory", [True, False])
def test_memory_is_pinned_for_values_that_wait_in_it(in_memory, tmp_path):
    """Half of six windows for each of two processes, two at a time: two values, and two in flight."""
    batches = [{"input_ids": window} for window in tokens(6, 16).split(2)]
    cuda = torch.device("cuda", 0)
    ranks = SingleProcess()
    ranks.size = 2
    settings = {} if in_memory else {"activations_dir": tmp_path}
    work = tasks(plain("llama"), batches, wc.WushConfig(), cuda, ranks=ranks, batch_size=2, **settings)
    pins = [task.args for task in work if task.func is warm_up._pin]
    assert pins == [(2 + 2, 2 * 16 * 64 * 2)] * in_memory


def test_other_inputs_have_no_tasks():
    assert tasks(torch.nn.Linear(32, 32), [(torch.zeros(2, 32),)], wc.WushConfig()) == []


@pytest.fixture
def ran(monkeypatch):
    """What `torch.cuda` and the tasks below do, in order. No GPU is needed: the tasks compute nothing."""
    ran = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: ran.append("cache emptied"))
    return ran


def test_a_task_that_fails_is_logged_and_the_others_run(ran, caplog):
    def broken():
        raise RuntimeError("made up")

    tasks = [broken, lambda: ran.append("task")]
    with caplog.at_level("DEBUG", "wush_compile"), run_during(lambda: None, tasks, torch.device("cuda")):
        pass
    assert "RuntimeError in the warm-up: made up" in caplog.text
    assert ran == ["task", "cache emptied"]


def test_a_cpu_runs_the_check_alone(ran):
    with run_during(lambda: ran.append("check"), [lambda: ran.append("task")], CPU):
        pass
    assert ran == ["check"]


def test_the_check_runs_beside_the_block_and_is_raised_after_it():
    here, seen = threading.get_ident(), []

    def check():
        time.sleep(0.05)
        seen.append(threading.get_ident())
        raise NonFiniteError("the weight w")

    with pytest.raises(NonFiniteError, match="the weight w"), run_during(check, [], CPU):
        seen.append("block")
    assert seen[0] == "block" and seen[1] != here


def test_threads_are_not_in_the_phases_of_the_run():
    def elsewhere():
        with phase("elsewhere"):
            time.sleep(0.05)

    with timing() as seconds, phase("here"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        time.sleep(0.01)
        with phase("inside"):
            thread.join()
    assert seconds.keys() == {"here", "inside"}
