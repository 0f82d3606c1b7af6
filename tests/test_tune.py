"""`wush-compile tune` without a GPU: candidates, the table in the cache, and which calls take it."""

from types import SimpleNamespace

import pytest
import torch
from models import quantized
from typer.testing import CliRunner

pytest.importorskip("triton")
from wush_compile.cli import app
from wush_compile.diagnostics import tune as tuning
from wush_compile.errors import ConfigError
from wush_compile.kernels.triton.linear import choose as tables
from wush_compile.kernels.triton.linear import fp4_linear, tuned
from wush_compile.kernels.triton.linear.choose import Fused, Gemv, Hopper

TABLE = {
    ("mxfp4", 4096, 4096): {1: Gemv(8, 4096, 4), 16: Fused(64, 16, 256, 4, 4, 4, True), 64: Hopper(128, 64, 2, 2, 8)},
    ("nvfp4", 4096, 512): {256: "bf16"},
}


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("WUSH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(tuned, "driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    caches = (tuned.read, fp4_linear.capability, fp4_linear.multiprocessors)
    for cache in caches:
        cache.cache_clear()
    yield 0
    for cache in caches:
        cache.cache_clear()


def test_the_table_comes_back_from_its_text(device):
    assert tuned.parse(tuned.dump(TABLE)) == TABLE
    assert "nvidia-h200-80-gb-13000-triton" in tuned.path(device).name
    assert tuned.read(device) == {}


def test_a_driver_that_cannot_be_asked_stops_nothing(device, monkeypatch, caplog):
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert tuned.driver_version() == 0

    def fails(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(tuned, "path", fails)
    assert tuned.read.__wrapped__(0) == {} and "no driver" in caplog.text


@pytest.mark.parametrize("text", ["", "[[1]]", '[["mxfp4", 1, 1, 1, "Unknown", 3]]', '{"a": 1}', "[3]"])
def test_a_broken_table_is_one_warning(device, text, caplog):
    tuned.path(device).parent.mkdir(parents=True)
    tuned.path(device).write_text(text)
    with caplog.at_level("WARNING", "wush_compile"):
        assert tuned.lookup(device, "mxfp4", 1, 4096, 4096) is tuned.lookup(device, "mxfp4", 2, 4096, 4096) is None
    assert len(caplog.records) == 1 and "wush-compile tune" in caplog.text


def test_the_next_larger_number_of_rows_counts(device):
    tuned.path(device).parent.mkdir(parents=True)
    tuned.path(device).write_text(tuned.dump(TABLE))
    mine = TABLE["mxfp4", 4096, 4096]
    wanted = {1: mine[1], 2: mine[16], 3: mine[16], 16: mine[16], 17: mine[64], 64: mine[64], 65: None, 4096: None}
    assert {m: tuned.lookup(device, "mxfp4", m, 4096, 4096) for m in wanted} == wanted
    assert tuned.lookup(device, "mxfp4", 1, 4096, 4224) is tuned.lookup(device, "nvfp4", 1, 4096, 4096) is None
    assert tuned.lookup(device, "nvfp4", 100, 4096, 512) == "bf16"


def test_no_tile_of_gluon_where_gluon_failed(device, monkeypatch):
    monkeypatch.setattr(tuned, "read", lambda device: TABLE)
    assert isinstance(tuned.lookup(device, "mxfp4", 64, 4096, 4096), Hopper)
    monkeypatch.setattr(tuned, "has_gluon", lambda: False)
    assert tuned.lookup(device, "mxfp4", 64, 4096, 4096) is None


def test_products_take_it(device, monkeypatch):
    monkeypatch.setattr(tuned, "read", lambda device: TABLE)

    def operands(rows, precise=False):
        codes = SimpleNamespace(device=SimpleNamespace(index=0))
        return SimpleNamespace(
            codes=codes, format="mxfp4", sizes=(rows, 4096, 4096), precise=precise, activation="same", lanes=False
        )

    for rows in (1, 9, 64):
        assert fp4_linear._choose(operands(rows), torch.bfloat16) == tuned.lookup(0, "mxfp4", rows, 4096, 4096)
    for o in (operands(65), operands(9, precise=True)):
        want = tables.choose("mxfp4", *o.sizes, (9, 0), o.precise, multiprocessors=132)
        assert fp4_linear._choose(o, torch.bfloat16) == want


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_candidates_are_kernels_of_their_device(format, capability):
    for rows in (1, 2, 3, 4, 16, 64, 200, 300):
        for n, k in ((4096, 4096), (28672, 4096), (4096, 96), (576, 1536)):
            found = tuning.candidates(format, rows, n, k, capability, 132)
            assert found[0] == tables.choose(format, rows, n, k, capability) and len(set(found)) == len(found)
            for kernel in found:
                assert capability == (9, 0) or not isinstance(kernel, Hopper)
                assert rows in tuned.GEMV_ROWS or not isinstance(kernel, Gemv)
                if isinstance(kernel, Fused):
                    assert k % kernel.block_k == 0 and k // kernel.block_k % kernel.split_k == 0
    if capability == (9, 0):
        assert len(tuning.candidates(format, 64, 4096, 4096, capability, 132)) > 5


def test_the_fastest_is_kept_beside_what_was_known(device):
    tuned.path(device).parent.mkdir(parents=True)
    tuned.path(device).write_text(tuned.dump({("nvfp4", 64, 64): {1: "bf16"}}))

    def compiles(jobs):
        return [job for job in jobs if not isinstance(job[4], Hopper)]

    slow = {}

    def last_is_fastest(job):
        slow[job[:4]] = slow.get(job[:4], 100.0) - 1.0
        return slow[job[:4]]

    table, lines = tuning.tune(device, [("mxfp4", 4096, 4096)], (1, 128), compiles, last_is_fastest)
    assert table == tuned.read(device)
    assert table["nvfp4", 64, 64] == {1: "bf16"}
    for m in (1, 128):
        last = compiles([("mxfp4", m, 4096, 4096, k) for k in tuning.candidates("mxfp4", m, 4096, 4096, (9, 0), 132)])[
            -1
        ][4]
        assert tuned.lookup(device, "mxfp4", m, 4096, 4096) == table["mxfp4", 4096, 4096][m] == last
    assert [line[:4] for line in lines] == [("mxfp4", 1, 4096, 4096), ("mxfp4", 128, 4096, 4096)]
    assert lines[0][4] > lines[0][5] and lines[1][4] is None  # the tables' own did not compile


def test_sizes_of_a_model():
    sizes = tuning.sizes_of(quantized("llama", layers=1))
    assert sizes and all(format == "mxfp4" and n and k % 32 == 0 for format, n, k in sizes)
    with pytest.raises(ConfigError, match="nothing to tune"):
        tuning.sizes_of(torch.nn.Linear(2, 2))


def test_the_command_needs_a_gpu():
    run = CliRunner().invoke(app, ["tune", "--device", "cpu"])
    assert run.exit_code == 1 and "the device is cpu" in run.output
