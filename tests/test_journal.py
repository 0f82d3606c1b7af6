"""quantize(out=DIR): a killed run resumes bit for bit; what is refused; what a failure leaves behind."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import files, measured, same_tensors
from torch import nn

import wush_compile as wc
from wush_compile.calibration import journal, variants
from wush_compile.calibration import solve_group as solving
from wush_compile.calibration.journal import Journal
from wush_compile.errors import CheckpointError, ConfigError, NonFiniteError


class Layer(nn.Module):
    """A norm, which stays, and two siblings and a linear, which are quantized."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(2 * width, width, bias=False)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(torch.cat((self.a(h), self.b(h)), -1))


class Net(nn.Module):
    def __init__(self, layers: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(64, 24)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Words(nn.Module):
    """Takes token ids, so that its batches can be taken apart."""

    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Embedding(50, 64), Net(3)

    def forward(self, input_ids):
        return self.net(self.embed(input_ids))


def net(kind: type = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


DATA = list(torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1)))
IDS = list(torch.randint(50, (3, 4, 16), generator=torch.Generator().manual_seed(2)))


def quantize(model, out, data=DATA, **settings):
    return wc.quantize(model, data, progress=False, out=out, **{"token_weights": "uniform", **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(directory, model) of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, quantize(net(), out)


@pytest.fixture
def failing(monkeypatch):
    """Makes the n-th call of a function fail once: failing(module, name, n, error)."""

    def install(module, name, n, error):
        real, calls = getattr(module, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
        return calls

    return install


# -- kills -----------------------------------------------------------------------------------------------------------

KILLED = """
    import os, random, signal, sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import safetensors.torch
    import tqdm
    import wush_compile as wc
    from wush_compile.calibration import journal, solve_group as solving, variants
    from test_journal import net, quantize

    tqdm.tqdm.monitor_interval = 0                          # a thread's lock, held while this forks, would stay locked
    quantize(net(), sys.argv[1] + "/warm")                  # what is imported lazily is imported once
    chance, ticks, at = random.Random(5), 0, 0

    def tick():
        global ticks
        ticks += 1
        if ticks == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            tick()
            result = real(*args, **kwargs)
            tick()
            return result

        setattr(module, name, call)

    def in_two_halves(state, path, metadata):
        data = safetensors.torch.save(state, metadata)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            tick()
            file.write(data[len(data) // 2:])

    journal.save_file = in_two_halves
    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (variants, "functional_call"),
                         (solving, "solve"), (variants, "rewrite")):
        around(module, name)

    def run(out, kill_at=0, kill_after=None):
        \"\"\"A run in a process of its own: whether it was killed.\"\"\"
        global at
        at = kill_at
        if child := os.fork():
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status == 0 or os.WIFSIGNALED(status), status
            if os.path.exists(out + "/config.json"):        # a directory loads only when it is whole
                wc.load(out, model=net())
            return status != 0
        quantize(net(), out)
        os._exit(0)

    start = time.perf_counter()
    quantize(net(), sys.argv[1] + "/counted")
    whole, seconds, kills = ticks, time.perf_counter() - start, 0
    ticks = 0
    for directory in range(4):                              # at every kind of step
        while run(f"{{sys.argv[1]}}/{{directory}}", kill_at=chance.randint(1, whole // 2)):
            kills += 1
    for _ in range(8):                                      # and at any time
        kills += run(sys.argv[1] + "/timed", kill_after=chance.uniform(0, seconds))
    run(sys.argv[1] + "/timed")
    print(kills)
"""


def test_killed_at_random_moments_the_result_is_that_of_an_uninterrupted_run(whole, tmp_path):
    script = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) >= 20
    for name in ("0", "1", "2", "3", "timed", "counted"):
        assert files(tmp_path / name) == files(whole[0]), name


# -- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_does_not_load_before(whole, tmp_path, failing):
    calls, model = failing(solving, "solve", 6, KeyboardInterrupt()), net()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path)
    assert same_tensors(model, net())
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        wc.load(tmp_path, model=net())
    calls.clear()
    quantize(model, tmp_path)
    assert len(calls) == 9 - 4  # two of four layers were finished, of two groups each
    assert same_tensors(model, whole[1]) and files(tmp_path) == files(whole[0])
    assert measured(model) == measured(whole[1])
    assert same_tensors(wc.load(tmp_path, model=net()), model)


def test_a_finished_run_solves_nothing_again(whole, tmp_path, failing):
    before = files(whole[0])
    calls = failing(solving, "solve", 1, AssertionError())
    assert same_tensors(quantize(net(), whole[0]), whole[1])
    assert not calls and files(whole[0]) == before


def test_a_damaged_shard_is_done_again(whole, tmp_path, failing):
    failing(solving, "solve", 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(net(), tmp_path)
    shard = sorted((tmp_path / ".wush").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    quantize(net(), tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_stages_of_another_solver_are_refused(whole, tmp_path, failing):
    failing(solving, "solve", 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(net(), tmp_path)
    path = tmp_path / ".wush" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"].pop("activation_rounding")  # as in a version that does not have it
    for other in ({}, {"solver": manifest.pop("solver") + 1}):  # before it was recorded, and a later one
        path.write_text(json.dumps(manifest | other))
        with pytest.raises(ConfigError, match="another version's solver.*--restart"):
            quantize(net(), tmp_path)
    quantize(net(), tmp_path, restart=True)
    assert files(tmp_path) == files(whole[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(solver="rtn"), "solver 'gptq', not 'rtn'"),
        (dict(data=DATA[:2]), "other data"),
        (dict(model=Words), "other (data|model)"),
        (dict(weight=1), "other model"),
        (dict(batch_size=2), "batch size as given, not 2"),
    ],
)
def test_other_settings_data_or_weights_are_refused(whole, change, message):
    change, before = dict(change), files(whole[0])
    model = net(change.pop("model", Net))
    if change.pop("weight", None):
        with torch.no_grad():
            model.layers[2].norm.weight[5] += 1
    data = IDS if isinstance(model, Words) else change.pop("data", DATA)
    with pytest.raises(ConfigError, match=message):
        quantize(model, whole[0], data, **change)
    assert files(whole[0]) == before


def test_restart_replaces_what_is_there_only_at_the_end(tmp_path, failing):
    first = quantize(net(), tmp_path, solver="rtn")
    (tmp_path / "notes.txt").write_text("mine")
    failing(solving, "solve", 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(net(), tmp_path, restart=True)
    assert same_tensors(wc.load(tmp_path, model=net()), first)
    second = quantize(net(), tmp_path)
    assert same_tensors(wc.load(tmp_path, model=net()), second) and not same_tensors(first, second)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_saved_checkpoint_is_replaced(whole, tmp_path):
    wc.save(wc.quantize(net(), DATA, solver="rtn", progress=False), tmp_path)
    quantize(net(), tmp_path)
    assert files(tmp_path) == files(whole[0])
    wc.save(whole[1], tmp_path)  # and a save takes the journal of what it replaces with it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "wush_report.json"]


def test_two_runs_exclude_each_other(tmp_path):
    with Journal(tmp_path), pytest.raises(CheckpointError, match="another run"):
        quantize(net(), tmp_path)
    quantize(net(), tmp_path)


def test_sampled_text_is_kept(tmp_path):
    calls = []
    for _ in range(2):
        with Journal(tmp_path) as kept:
            text = kept.remember("sampled", lambda: calls.append(1) or {"ids": torch.arange(6).view(2, 3)})["ids"]
            assert torch.equal(text, torch.arange(6).view(2, 3))
    assert calls == [1]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch_and_a_resumed_run_takes_that(tmp_path, failing):
    one, two = tmp_path / "one", tmp_path / "two"
    plain = wc.quantize(net(Words), IDS, progress=False, batch_size=4, token_weights="uniform")
    failing(variants, "functional_call", 29, torch.OutOfMemoryError("simulated"))
    model = quantize(net(Words), one, IDS)
    manifest = json.loads((one / ".wush" / "manifest.json").read_text())
    assert manifest["micro_batch"] == 2 and manifest["events"] == [
        {"stage": "net.layers.1", "micro_batch": 2, "reason": "out of memory"}
    ]
    assert not same_tensors(model, plain)
    failing(variants, "functional_call", 29, torch.OutOfMemoryError("simulated"))
    calls = failing(solving, "solve", 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(net(Words), two, IDS)
    calls.clear()
    assert same_tensors(quantize(net(Words), two, IDS), model) and len(calls) == 3
    assert files(two) == files(one)


def test_a_single_sequence_that_does_not_fit_is_an_error(monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(variants, "functional_call", short)
    with pytest.raises(wc.WushError, match="does not fit the memory of cpu"):
        wc.quantize(net(Words), IDS, progress=False)
    with pytest.raises(wc.WushError, match="does not fit the memory of cpu"):
        wc.quantize(net(), DATA, progress=False)


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_our_error_and_the_run_goes_on(whole, tmp_path, failing):
    model = net()
    failing(journal, "save_file", 3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="No space left.*finished layers are kept"):
        quantize(model, tmp_path)
    assert same_tensors(model, net()) and not list(tmp_path.rglob("*.partial"))
    quantize(model, tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_a_directory_that_cannot_be_written_is_an_error_before_any_work(tmp_path, monkeypatch, failing):
    calls = failing(variants, "functional_call", 0, None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        quantize(net(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize(net(), tmp_path)
    failing(os, "mkdir", 1, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    with pytest.raises(CheckpointError, match="cannot be written .Read-only"):
        quantize(net(), tmp_path / "new")
    assert not calls and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_that_fails_in_its_first_layer_leaves_nothing(tmp_path, failing):
    bad = [DATA[0], DATA[1].clone(), DATA[2]]
    bad[1][7, 3] = torch.nan
    calls = failing(solving, "solve", 0, None)
    with pytest.raises(NonFiniteError, match=r"layers.0.a: its calibration inputs hold NaN or Inf in batch 1"):
        quantize(net(), tmp_path / "out", bad)
    assert not calls and not (tmp_path / "out").exists()
