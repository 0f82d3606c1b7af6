"""Several processes: two ranks of gloo on the CPU against one process; failures and deaths of a rank."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import plain, tokens
from moe_models import moe

import wush_compile as wc
from wush_compile.calibration import loop as calibrate
from wush_compile.calibration.ranks import Ranks, SingleProcess, assign, join, merge_samples
from wush_compile.calibration.solve_experts import shares
from wush_compile.calibration.variants import Variant
from wush_compile.errors import NonFiniteError, WushError
from wush_compile.solver.solution import solve_cost

WINDOWS, LENGTH = 10, 48
# Groups of one linear: in a step are then q, k and v, or gate and up, which the processes share.
SETTINGS = {"solver": "gptq", "activation_format": "fp8", "share_transform": False, "progress": False}


def data():
    """Batches of unequal size: the border between the two ranks cuts one batch."""
    windows = tokens(WINDOWS, LENGTH, seed=3)
    return [windows[:4], windows[4:8], windows[8:]]


class Watch:
    """Counts the tokens that this process forwards, keeps groups' moments, and puts `given` ones in their place."""

    def __init__(self, monkeypatch, given=None):
        self.forwarded, self.moments, self.crosses, self.given = 0, {}, {}, given
        for team in (SingleProcess, Ranks):
            monkeypatch.setattr(team, "reduce", self.reduce(team.reduce))
        for name in ("observe", "propagate"):
            monkeypatch.setattr(Variant, name, self.counted(getattr(Variant, name)))

    def counted(self, forwards):
        def run(variant, *args):
            for index, step in enumerate(forwards(variant, *args)):
                self.forwarded += variant.batches[index].tokens()
                yield step

        return run

    def reduce(self, original):
        def reduced(team, seen, costs):
            original(team, seen, costs)
            for i, observation in seen.items():
                if observation.moment is not None:
                    self.moments[i], self.crosses[i] = observation.moment.clone(), observation.cross.clone()
                    if self.given is not None:
                        observation.moment.copy_(self.given[0][i])
                        observation.cross.copy_(self.given[1][i])

        return reduced


def broken(*args):
    raise NonFiniteError("made up")


def errors(rank: int, monkeypatch) -> list[str]:
    """The errors of each process: for data that cannot be shared out, and for failures of the second process alone."""

    def attempt(work, *arguments, **settings) -> str:
        with pytest.raises(WushError) as caught:
            work(*arguments, **settings)
        return f"{caught.type.__name__}: {caught.value}"

    different = data()
    different[0][0, 0] += rank
    said = [
        attempt(join(torch.device("cpu")).share, [{"input_ids": b} for b in batches])
        for batches in (different, [data()[0][:1]])
    ]
    for owner, name in ((calibrate.Calibration, "_check_finite"), (calibrate, "solve_group")):
        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr(owner, name, broken)
            said.append(attempt(wc.quantize, plain("llama", torch.float32, layers=1), data(), **SETTINGS))
    return said


def worker(mode: str, out: str) -> None:
    """One process of the tests below."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if mode == "die" and rank == 1:
            solve = calibrate.solve_group

            def killed(group, *args):
                if "layers.1" in group.name:
                    os.kill(os.getpid(), signal.SIGKILL)
                return solve(group, *args)

            monkeypatch.setattr(calibrate, "solve_group", killed)
        said = errors(rank, monkeypatch) if mode == "work" else []
        watch = Watch(monkeypatch)
        journal = None if mode == "work" else f"{out}/checkpoint"
        model = wc.quantize(plain("llama", torch.float32), data(), out=journal, **SETTINGS)
    result = {"state": model.state_dict(), "moments": watch.moments, "crosses": watch.crosses}
    if mode == "work":
        mixture = wc.quantize(moe("qwen3_moe", torch.float32), data(), **SETTINGS)
        result |= {"mixture": mixture.state_dict(), "report": mixture.wush_quantization.report}
    torch.save(result, f"{out}/{rank}.pt")
    Path(f"{out}/{rank}.json").write_text(json.dumps({"forwarded": watch.forwarded, "said": said}))


def launch(mode: str, out: Path, size: int = 2) -> list[tuple[int, str]]:
    """(exit status, stderr) of each process; the environment is torchrun's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = f"import test_distributed; test_distributed.worker({mode!r}, {str(out)!r})"
    processes = []
    for rank in range(size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        processes.append(subprocess.Popen([sys.executable, "-c", command], env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [p.communicate(timeout=120)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def finished(mode: str, out: Path) -> tuple[list[dict], list[dict]]:
    """What each of two processes reports, and its tensors."""
    for status, error in launch(mode, out):
        assert status == 0, error[-3000:]
    return (
        [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)],
        [torch.load(out / f"{rank}.pt") for rank in range(2)],
    )


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.fixture
def one_thread():
    """As many as the processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return finished("work", tmp_path_factory.mktemp("two"))


def test_two_processes_are_one(two, one_thread, monkeypatch):
    reports, results = two
    for rank, report in enumerate(reports):
        differ, few, forward, solve = report["said"]
        assert differ.startswith("DataError") and "different calibration data" in differ
        assert few.startswith("DataError") and "1 calibration windows for 2 processes" in few
        assert forward == solve == ("WushError: rank 1: made up" if rank == 0 else "NonFiniteError: made up")

    watch = Watch(monkeypatch)
    alone = wc.quantize(plain("llama", torch.float32), data(), **SETTINGS)
    forwarded = [report["forwarded"] for report in reports]
    # The embedding once, the first layer in four steps and once more, the last layer in four steps, since nothing reads
    # its output.
    assert sum(forwarded) == watch.forwarded == 10 * WINDOWS * LENGTH
    assert forwarded[0] == forwarded[1]

    first, second = (r["moments"] for r in results)
    assert first and second and not set(first) & set(second)  # each group's moments are on one rank
    both = first | second
    assert list(range(14)) == sorted(both) == sorted(watch.moments)
    for i in range(3):  # q, k and v of the first layer, whose input no code has changed
        assert (both[i] - watch.moments[i]).norm() <= 1e-5 * watch.moments[i].norm()

    # Sums in another order flip codes at ties. With the moments of the two, one process finds their codes.
    crosses = results[0]["crosses"] | results[1]["crosses"]
    watch = Watch(monkeypatch, (both, crosses))
    alone = wc.quantize(plain("llama", torch.float32), data(), **SETTINGS)
    for i in range(14):
        assert (crosses[i] - watch.crosses[i]).norm() <= 1e-3 * watch.crosses[i].norm()
        assert (both[i] - watch.moments[i]).norm() <= 1e-5 * watch.moments[i].norm()
    states = [r["state"] for r in results]
    assert_same_state(*states)
    assert_same_state(states[0], alone.state_dict())


def test_experts_of_two_processes(two):
    first, second = two[1]
    assert_same_state(first["mixture"], second["mixture"])
    alone = wc.quantize(moe("qwen3_moe", torch.float32), data(), **SETTINGS)
    for name, report in alone.wush_quantization.report.items():
        for key in ("tokens", "tokens_by_expert"):
            assert first["report"][name].get(key) == second["report"][name].get(key) == report.get(key)
        if "experts" in report:
            assert sum(report["tokens_by_expert"]) == 2 * WINDOWS * LENGTH
            assert first["report"][name]["relative_loss"] == pytest.approx(report["relative_loss"], rel=0.1)


def test_a_death_ends_the_others_and_the_journal_goes_on(two, tmp_path):
    (status, error), (killed, _) = launch("die", tmp_path)
    assert killed == -signal.SIGKILL and status == 1
    assert "WushError: rank 0 lost another process" in error and "start the same command again" in error
    kept = sorted(path.name for path in (tmp_path / "checkpoint" / ".wush").glob("stage-*.json"))
    assert kept == ["stage-00000.json", "stage-00001.json"]  # the embedding and the first layer
    before = [(tmp_path / "checkpoint" / ".wush" / name).read_bytes() for name in kept]

    _, results = finished("resume", tmp_path)
    assert [(tmp_path / "checkpoint" / ".wush" / name).read_bytes() for name in kept] == before
    _, uninterrupted = two
    for result in results:
        assert_same_state(result["state"], uninterrupted[0]["state"])
    assert_same_state(wc.load(tmp_path / "checkpoint").state_dict(), results[0]["state"])


# -- parts -----------------------------------------------------------------------------------------------------------


def rows(first: int, count: int, capacity: int = 28) -> torch.Tensor:
    """A sample of `count` rows numbered from `first`: 28 uniform slots, 4 of the largest."""
    sample = torch.zeros(capacity + 4, 2)
    filled = min(count, capacity)
    sample[:filled, 0] = torch.arange(first, first + filled) + 1.0
    sample[capacity:, 0] = torch.tensor([1e3, 2e3, 3e3, 4e3])[:4] + first
    return sample


@pytest.mark.parametrize("counts", [(5, 7), (28, 1000), (1000, 1000), (3, 500, 40), (0, 9), (10,)])
def test_merged_samples(counts):
    samples = [rows(100 * r, c) for r, c in enumerate(counts)]
    merged = merge_samples(samples, list(counts))
    uniform = merged[:28, 0][merged[:28, 0] != 0].tolist()
    assert len(uniform) == len(set(uniform)) == min(28, sum(counts))  # no row twice, no slot wasted
    own = [sum(100 * r < u <= 100 * r + 100 for u in uniform) for r in range(len(counts))]
    for count, share in zip(counts, own, strict=True):
        assert share == count or abs(share - 28 * count / sum(counts)) < 1
    largest = sorted(x for s in samples for x in s[28:, 0].tolist())[-4:]
    assert sorted(merged[28:, 0].tolist()) == largest
    assert torch.equal(merged, merge_samples(samples, list(counts)))


def test_groups_are_spread():
    """In Llama-3.1-8B the down projection costs as much as the other three groups of a layer; gate and up come next."""
    layer = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    costs = {i: solve_cost(wc.WushConfig(), *shape) for i, shape in enumerate(layer)}
    assert assign(costs, 2) == {3: 0, 2: 1, 0: 1, 1: 1}
    assert assign(costs, 3) == {3: 0, 2: 1, 0: 2, 1: 2}
    assert set(assign({0: 64, 1: 64, 2: 64, 3: 64}, 4).values()) == {0, 1, 2, 3}
    assert assign({}, 2) == {}


def test_experts_are_spread():
    assert shares(128, 2) == [range(64), range(64, 128)] and shares(5, 2) == [range(2), range(2, 5)]
    assert shares(3, 8) == [range(1), range(1, 2), range(2, 3)] and shares(4, 1) == [range(4)]
    units = {(i, k): cost for i, cost in ((0, 1.0), (1, 6.0), (2, 2.0)) for k in range(2)}
    owners = assign(units, 2)
    assert all(owners[i, 0] != owners[i, 1] for i in range(3))
