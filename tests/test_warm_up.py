"""What runs in threads while the model is traced."""

import threading
import time

import pytest
import torch
from models import plain, tokens

import wush_compile as wc
from wush_compile.calibration import warm_up
from wush_compile.calibration.context import Run
from wush_compile.calibration.ranks import SingleProcess
from wush_compile.calibration.tensors import ModelTensors
from wush_compile.calibration.warm_up import run_during, warm_up_tasks
from wush_compile.errors import NonFiniteError
from wush_compile.phases import phase, timing

CPU = torch.device("cpu")


def tasks(model, batches, config, device=CPU, **settings):
    return list(warm_up_tasks(model, batches, config, Run(ModelTensors(model), device, **settings)))


@pytest.mark.parametrize(
    "config",
    [
        wc.WushConfig(),
        wc.WushConfig(format="nvfp4", moments="conditional"),
        wc.WushConfig(format="int4", solver="rtn"),
        wc.WushConfig(solver="rtn", transform="hadamard"),
        wc.WushConfig(transform="identity"),
    ],
    ids=str,
)
def test_tasks_do_what_a_run_does(config):
    """Every op and the solver take what they are given: each task runs to its end, for each shape once."""
    batches = [{"input_ids": window} for window in tokens(6, 16).split(2)]
    work = tasks(plain("llama"), batches, config)
    # q and o, k and v, gate and up, down; and one group is solved. The head is not quantized.
    assert len(work) == 4 + 1
    for task in work:
        task()


@pytest.mark.parametrize(("settings", "more"), [({}, 1), ({"activations_dir": "values"}, 0)], ids=str)
def test_memory_is_pinned_for_values_that_wait_in_it(settings, more):
    """For half of six windows in two processes, two at a time: two values, and two on their way."""
    batches = [{"input_ids": window} for window in tokens(6, 16).split(2)]
    cuda = torch.device("cuda", 0)
    ranks = SingleProcess()
    ranks.size = 2
    work = tasks(plain("llama"), batches, wc.WushConfig(), cuda, ranks=ranks, batch_size=2, **settings)
    pins = [task.args for task in work if task.func is warm_up._pin]
    assert pins == [(2 + 2, 2 * 16 * 64 * 2)] * more


def test_nothing_is_known_of_other_inputs():
    assert tasks(torch.nn.Linear(32, 32), [(torch.zeros(2, 32),)], wc.WushConfig()) == []


def test_a_task_that_fails_is_harmless(monkeypatch, caplog):
    """On a CPU no task runs at all; `_attempt` is what keeps a GPU's failures."""

    def broken():
        raise RuntimeError("made up")

    with run_during(lambda: None, [broken], CPU):
        pass
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    with caplog.at_level("DEBUG", "wush_compile"):
        warm_up._attempt(broken, CPU)
    assert "made up" in caplog.text


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
