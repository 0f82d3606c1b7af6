"""Checkpoints of plain modules: exact reloads, equal bytes, refusals, and saves that are killed half-way."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import Branches, branches, files, quantize, same_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import wush_compile as wc
from wush_compile.checkpoint import atomic
from wush_compile.checkpoint import layout as checkpoint
from wush_compile.checkpoint import save_load as storage
from wush_compile.checkpoint.files import digest
from wush_compile.checkpoint.record import ATTRIBUTE
from wush_compile.errors import CheckpointError, WushError
from wush_compile.modules import WushLinear

SETTINGS = [
    {"format": "mxfp4"},
    {"format": "mxfp4", "transform": "hadamard", "weight_scale_rule": "paper", "activation_scale_rule": "paper"},
    {"format": "nvfp4", "transform_block_size": 32},
    {"format": "nvfp4", "transform": "identity", "share_transform": False},
    {"format": "int4", "transform": "random"},
]


@pytest.fixture(scope="module")
def quantized():
    return branches(format="nvfp4")


@pytest.fixture
def saved(quantized, tmp_path):
    """(quantized model, its input, its checkpoint)."""
    model, x = copy.deepcopy(quantized)
    wc.save(model, tmp_path / "saved")
    return model, x, tmp_path / "saved"


def edit_config(directory: Path, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# -- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reload_is_exact_and_saves_the_same_bytes(tmp_path, settings, dtype):
    model, x = branches(dtype, **settings)
    wc.save(model, tmp_path / "a")
    wc.save(model, tmp_path / "b")
    skeleton = Branches()  # of another dtype: what was saved wins
    loaded = wc.load(tmp_path / "a", model=skeleton)
    assert loaded is skeleton
    assert same_tensors(model, loaded)
    assert torch.equal(model(x), loaded(x))
    wc.save(loaded, tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    record, again = getattr(model, ATTRIBUTE), getattr(loaded, ATTRIBUTE)
    assert (record.config, record.groups, record.ignored) == (again.config, again.groups, again.ignored)


def test_names_on_disk(saved):
    *_, directory = saved
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = set(file.keys())
    each = {f"{m}.{t}" for m in ("q", "k", "out") for t in ("weight_packed", "weight_scale", "weight_global_scale")}
    groups = {f"{m}.{t}" for m in ("q", "out") for t in ("input_transform", "input_global_scale", "input_feedback")}
    assert names == each | groups | {"k.bias", "out.bias", "norm.weight", "norm.bias", "steps"}
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert set(settings) == {"quant_method", "format_version", "config", "groups", "ignored"}
    assert settings["quant_method"] == "wush" and settings["format_version"] == 5
    assert settings["groups"] == [
        {"members": ["q", "k"], "transform_block_size": 16, "recipe": {}},
        {"members": ["out"], "transform_block_size": 16, "recipe": {}},
    ]


def test_rows_on_disk_belong_to_their_members(saved):
    model, _, directory = saved
    tensors = load_file(directory / "model.safetensors")
    group = model.q.owner
    assert torch.equal(torch.cat((tensors["q.weight_packed"], tensors["k.weight_packed"])), group.weight_packed)
    assert torch.equal(tensors["k.bias"], group.bias[64:])
    assert tensors["q.weight_scale"].shape == (64, 4) and tensors["k.weight_scale"].shape == (32, 4)
    assert torch.equal(tensors["q.weight_global_scale"], tensors["k.weight_global_scale"])


def test_meta_skeleton(saved):
    model, x, directory = saved
    with torch.device("meta"):
        skeleton = Branches()
    loaded = wc.load(directory, model=skeleton)
    assert same_tensors(model, loaded) and torch.equal(model(x), loaded(x))


def test_loaded_tensors_do_not_map_the_files(saved):
    model, x, directory = saved
    loaded = wc.load(directory, model=Branches())
    with open(directory / "model.safetensors", "r+b") as file:  # as a careless writer would
        file.seek(0)
        file.write(b"\0" * os.path.getsize(directory / "model.safetensors"))
    assert same_tensors(model, loaded) and torch.equal(model(x), loaded(x))


def test_mixed_dtypes_and_requires_grad_stay(tmp_path):
    torch.manual_seed(0)
    model = Branches(torch.bfloat16)
    quantize(model, torch.randn(4, 64, dtype=torch.bfloat16))
    model.norm.weight = nn.Parameter(model.norm.weight.double(), requires_grad=False)
    wc.save(model, tmp_path / "a")
    skeleton = Branches()
    skeleton.norm.weight.requires_grad_(False)
    loaded = wc.load(tmp_path / "a", model=skeleton)
    assert same_tensors(model, loaded)
    assert loaded.norm.weight.dtype == torch.float64 and not loaded.norm.weight.requires_grad
    assert loaded.norm.bias.requires_grad


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 9))
    model = quantize(Tied(), ids, ignore=("head",))
    wc.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert "embed.weight" in file.keys() and "head.weight" not in file.keys()  # noqa: SIM118
    loaded = wc.load(tmp_path / "a", model=Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert same_tensors(model, loaded) and torch.equal(model(ids), loaded(ids))
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(CheckpointError, match="lacks head.weight"):
        wc.load(tmp_path / "a", model=untied)


def test_build_groups_leaves_the_skeleton_alone(saved):
    model, _, _ = saved
    skeleton = Branches()
    groups = checkpoint.build_groups(skeleton, getattr(model, ATTRIBUTE))
    assert [[m.name for m in g.members] for g in groups] == [["q", "k"], ["out"]]
    assert all(t.is_meta for g in groups for t in g.buffers())
    for group, own in zip(groups, (model.q.owner, model.out.owner), strict=True):
        assert {n: (t.shape, t.dtype) for n, t in group.named_buffers()} == {
            n: (t.shape, t.dtype) for n, t in own.named_buffers()
        }
    assert type(skeleton.q) is nn.Linear


def test_split_rows_have_storages_of_their_own(saved):
    state = checkpoint.split_state_dict(saved[0])
    storages = [t.untyped_storage().data_ptr() for t in state.values()]
    assert len(set(storages)) == len(storages)
    assert state["k.weight_packed"].data_ptr() == saved[0].q.owner.weight_packed[64:].data_ptr()  # no copy


# -- refusals --------------------------------------------------------------------------------------------------------


def truncate(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(directory / "model.safetensors") - 100)


def cut_header(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(20)


def flip_a_bit(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def only_a_pickle(directory):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def settings(**changes):
    return lambda d: edit_config(d, lambda c: c["quantization_config"].update(changes))


def downgrade(directory: Path, version: int) -> None:
    """Makes the checkpoint one of an earlier format_version: 1 and 2 knew no rounding but to nearest, and version 1
    had one recipe for all groups."""

    def change(config: dict) -> None:
        settings = config["quantization_config"]
        settings["format_version"] = version
        del settings["config"]["correction"]
        assert settings["config"]["weight_scale_rule"] == "loss"
        if version < 4:
            settings["config"]["weight_scale_rule"] = "best"
            for group in settings["groups"]:
                group["recipe"].pop("weight_scale_rule", None)
        if version < 3:
            del settings["config"]["activation_rounding"]
        if version == 1:
            del settings["config"]["overrides"]
            for group in settings["groups"]:
                del group["recipe"]
        tensors = load_file(directory / "model.safetensors")
        config["wush_sha256"] = digest(settings, tensors, tensors.__getitem__)

    edit_config(directory, change)


OTHER_FORMAT = {"overrides": {"out": {"format": "mxfp4", "weight_scale_rule": "mse"}}}


@pytest.mark.parametrize("version,settings", [(1, {}), (2, OTHER_FORMAT), (3, OTHER_FORMAT), (4, OTHER_FORMAT)])
def test_earlier_versions_still_load_and_are_saved_as_the_newest(tmp_path, version, settings):
    """Up to 4 no weights are corrected; up to 3 `best` stood for `loss` of nvfp4, `mse` of mxfp4, without factors."""
    rounding = "nearest" if version < 3 else "feedback"
    settings = settings | {"activation_rounding": rounding, "correction": 0.0}
    model, x = branches(format="nvfp4", weight_scale_rule="loss", **settings)
    directory = tmp_path / "saved"
    wc.save(model, directory)
    before = files(directory)
    downgrade(directory, version)
    assert files(directory) != before
    loaded = wc.load(directory, model=Branches())
    assert torch.equal(loaded(x), model(x))
    record, again = getattr(model, ATTRIBUTE), getattr(loaded, ATTRIBUTE)
    assert (record.config, record.groups, record.ignored) == (again.config, again.groups, again.ignored)
    recipes = [again.recipe_of(entry) for entry in again.groups]
    assert all(recipe.rounds_with_feedback == (version > 2) and not recipe.factors_rows for recipe in recipes)
    wc.save(loaded, tmp_path / "again")
    assert files(tmp_path / "again") == before


def test_version_1_that_quantized_the_head_says_so(tmp_path):
    model, _ = branches(format="nvfp4", weight_scale_rule="loss", activation_rounding="nearest", correction=0.0)
    wc.save(model, directory := tmp_path / "saved")
    edit_config(directory, lambda c: c["quantization_config"]["config"].update(ignore=[]))
    downgrade(directory, 1)
    assert getattr(wc.load(directory, model=Branches()), ATTRIBUTE).config.ignore == ("lm_head", "!lm_head")


def test_the_report_is_saved_and_read_again(saved, caplog):
    model, _, directory = saved
    record = getattr(model, ATTRIBUTE)
    assert record.report["q"]["tokens"] == 35 and {"relative_loss", "seconds"} <= record.report["q"].keys()
    assert getattr(wc.load(directory, model=Branches()), ATTRIBUTE).report == record.report
    (directory / "wush_report.json").write_text('{"groups": {"q": 3}}')
    assert getattr(wc.load(directory, model=Branches()), ATTRIBUTE).report == {}
    assert "explain shows no losses" in caplog.text
    (directory / "wush_report.json").unlink()
    assert getattr(wc.load(directory, model=Branches()), ATTRIBUTE).report == {}


def test_a_replaced_checkpoint_does_not_keep_the_old_report(saved):
    model, _, directory = saved
    getattr(model, ATTRIBUTE).report = {}
    wc.save(model, directory)
    assert not (directory / "wush_report.json").exists()


def swap_members(directory):
    edit_config(directory, lambda c: c["quantization_config"]["groups"].reverse())


DAMAGE = {
    "truncated": (truncate, "truncated or damaged"),
    "truncated header": (cut_header, "truncated or damaged"),
    "flipped bit": (flip_a_bit, "not those that were saved"),
    "swapped tensors": (
        lambda d: edit_weights(d, lambda t: t.update({"norm.weight": t["norm.bias"].clone()})),
        "not those that were saved",
    ),
    "edited settings": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["config"].update(seed=1)),
        "not those that were saved",
    ),
    "reordered groups": (swap_members, "not those that were saved"),
    "no digest": (lambda d: edit_config(d, lambda c: c.pop("wush_sha256")), "has no wush_sha256"),
    "missing file": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (only_a_pickle, "never unpickled"),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop("k.weight_scale")), "lacks k.weight_scale"),
    "missing bias": (lambda d: edit_weights(d, lambda t: t.pop("k.bias")), "lacks k.bias"),
    "missing parameter": (lambda d: edit_weights(d, lambda t: t.pop("norm.weight")), "lacks norm.weight"),
    "unknown tensor": (lambda d: edit_weights(d, lambda t: t.update(extra=torch.ones(2))), "no extra"),
    "bias too many": (lambda d: edit_weights(d, lambda t: t.update({"q.bias": torch.ones(64)})), "no q.bias"),
    "wrong shape": (
        lambda d: edit_weights(d, lambda t: t.update({"q.weight_packed": t["q.weight_packed"][:-1].clone()})),
        r"q.weight_packed is torch.uint8 \[63, 32\], the model needs torch.uint8 \[64, 32\]",
    ),
    "wrong dtype": (
        lambda d: edit_weights(d, lambda t: t.update({"q.weight_scale": t["q.weight_scale"].float()})),
        "q.weight_scale is torch.float32",
    ),
    "integer transform": (
        lambda d: edit_weights(d, lambda t: t.update({"q.input_transform": t["q.input_transform"].int()})),
        "q.input_transform is torch.int32",
    ),
    "wrong parameter": (
        lambda d: edit_weights(d, lambda t: t.update({"norm.bias": torch.ones(63)})),
        r"norm.bias has shape \[63\]",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "is not a checkpoint: it has no config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "another config": (lambda d: (d / "config.json").write_text("[1]"), "is not a wush checkpoint"),
    "another method": (settings(quant_method="gptq"), "is not a wush checkpoint"),
    "newer": (settings(format_version=6), "format_version 6.*upgrade"),
    "unknown key": (settings(color="red"), "unknown keys color"),
    "missing key": (lambda d: edit_config(d, lambda c: c["quantization_config"].pop("ignored")), "lacks ignored"),
    "unknown setting": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["config"].update(shape=1)),
        "shape",
    ),
    "unknown format": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["config"].update(format="mxfp5")),
        "did you mean 'mxfp4'",
    ),
    "malformed groups": (settings(groups=3), "malformed"),
    "malformed members": (settings(groups=[{"members": "q", "transform_block_size": 16, "recipe": {}}]), "malformed"),
    "a linear twice": (
        settings(groups=[{"members": ["q", "k"], "transform_block_size": 16, "recipe": {}}] * 2),
        "in two groups",
    ),
    "no such linear": (
        settings(groups=[{"members": ["z"], "transform_block_size": 16, "recipe": {}}]),
        "quantizes 'z', which this",
    ),
    "no linear": (
        settings(groups=[{"members": ["norm"], "transform_block_size": 16, "recipe": {}}]),
        "'norm', which is a LayerNorm",
    ),
    "no siblings": (
        settings(groups=[{"members": ["q", "out"], "transform_block_size": 16, "recipe": {}}]),
        r"widths \[64, 96\]",
    ),
    "wide blocks": (settings(groups=[{"members": ["out"], "transform_block_size": 64, "recipe": {}}]), "blocks of 64"),
    "recipe of an unknown setting": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["groups"][0].update(recipe={"shape": 1})),
        "quantization_config.config cannot be read",
    ),
    "recipe of an unknown format": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["groups"][0].update(recipe={"format": "fp3"})),
        "unknown format 'fp3'",
    ),
    "no recipe": (
        lambda d: edit_config(d, lambda c: c["quantization_config"]["groups"][0].pop("recipe")),
        "has the keys",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_model_left_alone(saved, name):
    damage, message = DAMAGE[name]
    *_, directory = saved
    damage(directory)
    skeleton = Branches()
    before = {k: v.clone() for k, v in skeleton.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        wc.load(directory, model=skeleton)
    assert type(skeleton.q) is nn.Linear and not hasattr(skeleton, ATTRIBUTE)
    assert all(torch.equal(v, before[k]) for k, v in skeleton.state_dict().items())


def test_other_refusals_to_load(saved, tmp_path):
    model, _, directory = saved
    with pytest.raises(CheckpointError, match="not a directory"):
        wc.load(tmp_path / "nowhere", model=Branches())
    with pytest.raises(CheckpointError, match="model=..."):
        wc.load(directory)
    with pytest.raises(CheckpointError, match="already quantized"):
        wc.load(directory, model=model)
    narrow = Branches()
    narrow.q = nn.Linear(64, 48, bias=False)
    with pytest.raises(CheckpointError, match="q.weight_packed"):
        wc.load(directory, model=narrow)
    with torch.device("meta"):
        lost = Branches()
        lost.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(CheckpointError, match="table is on the meta device"):
        wc.load(directory, model=lost)


def test_refusals_to_save(saved, tmp_path):
    model, _, directory = saved
    with pytest.raises(WushError, match="not quantized"):
        wc.save(Branches(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="empty it first"):
        wc.save(model, home)
    assert os.listdir(home) == ["thesis.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        wc.save(model, home / "thesis.txt")
    model.norm.to("meta")
    before = files(directory)
    with pytest.raises(CheckpointError, match="norm.weight has no values"):
        wc.save(model, directory)
    assert files(directory) == before and sorted(os.listdir(tmp_path)) == ["home", "saved"]


# -- replacing a directory -------------------------------------------------------------------------------------------


def test_saves_into_new_empty_nested_and_linked_directories(saved, tmp_path):
    model, _, directory = saved
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(directory)
    wc.save(model, tmp_path / "empty")
    wc.save(model, tmp_path / "deep" / "er")
    wc.save(model, tmp_path / "link")
    assert files(directory) == files(tmp_path / "empty") == files(tmp_path / "deep" / "er")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty").stat().st_mode & 0o777 == 0o750


def test_replacing_keeps_what_is_no_part_of_a_checkpoint(saved):
    model, _, directory = saved
    expected = files(directory)
    (directory / "README.md").write_text("notes")
    (directory / "figures").mkdir()
    (directory / "figures" / "a.txt").write_text("1")
    (directory / "latest").symlink_to("README.md")
    (directory / "model-00001-of-00002.safetensors").write_text("stale")
    wc.save(model, directory)
    assert (directory / "README.md").read_text() == "notes" and (directory / "figures" / "a.txt").read_text() == "1"
    assert os.readlink(directory / "latest") == "README.md"
    assert set(files(directory)) == {*expected, "README.md", "figures/a.txt", "latest"}


def test_a_failed_save_leaves_no_trace(saved, monkeypatch):
    model, _, directory = saved
    before = files(directory)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        wc.save(model, directory)
    assert files(directory) == before and os.listdir(directory.parent) == ["saved"]


def test_without_exchange(saved, monkeypatch):
    model, x, directory = saved
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    before = files(directory)
    wc.save(model, directory)
    assert files(directory) == before and os.listdir(directory.parent) == ["saved"]
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        wc.save(model, directory)
    assert files(directory) == before and os.listdir(directory.parent) == ["saved"]


def test_a_living_writer_is_left_alone(saved):
    model, _, directory = saved
    with atomic.replaced_directory(directory) as partial:
        shutil.copytree(directory, partial, dirs_exist_ok=True)
        wc.save(model, directory)
        assert partial.is_dir()
        (partial / "mine").write_text("last")
    assert (directory / "mine").exists() and os.listdir(directory.parent) == ["saved"]


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    from helpers import branches
    import wush_compile as wc
    from wush_compile.checkpoint import atomic, save_load as storage

    model, _ = branches(format="nvfp4", seed=1, transform="random")

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after(module, name):
        real = getattr(module, name)
        setattr(module, name, lambda *a, **k: (real(*a, **k), die()))

    def half(state, path, metadata):
        import safetensors.torch
        data = safetensors.torch.save(state, metadata)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        die()

    def no_exchange():
        atomic._exchange = lambda a, b: False

    def die_between_renames():
        no_exchange()
        rename = os.rename
        os.rename = lambda a, b: (rename(a, b), str(b).endswith(".previous") and die())

    points = {{
        "before anything": lambda: setattr(storage, "_save_module", die),
        "half the weights": lambda: setattr(storage, "save_file", half),
        "all written": lambda: setattr(atomic, "_flush_tree", die),
        "flushed": lambda: setattr(atomic, "_install", die),
        "exchanged": lambda: die_after(atomic, "_exchange"),
        "installed": lambda: die_after(atomic, "_install"),
        "between two renames": die_between_renames,
        "two renames": lambda: (no_exchange(), die_after(atomic, "_install")),
    }}
    for argument in sys.argv[1:]:
        point, directory = argument.split("=", 1)
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        else:
            points[point]()
            wc.save(model, directory)
            os._exit(0)
"""
OLD = ["before anything", "half the weights", "all written", "flushed", "between two renames"]
NEW = ["exchanged", "installed", "two renames"]


def kill_at(points: list[str], directories: list[Path]) -> None:
    """Saves in one process each, killed at a point each; all are forks of one that has the model."""
    script = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent)))
    arguments = [f"{point}={directory}" for point, directory in zip(points, directories, strict=True)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # forks share no thread pool
    subprocess.run([sys.executable, "-c", script, *arguments], env=environment, check=True, timeout=300)


def test_a_killed_save_leaves_the_old_or_the_new(saved, tmp_path):
    model, _, directory = saved
    copies = [tmp_path / str(i) / "model" for i in range(len(OLD + NEW))]
    for path in copies:
        shutil.copytree(directory, path)
    first = [tmp_path / name / "model" for name in ("a", "b")]
    kill_at([*OLD, *NEW, "half the weights", "flushed"], copies + first)
    other, _ = branches(format="nvfp4", seed=1, transform="random")
    assert not same_tensors(other, model)
    for point, path in zip(OLD + NEW, copies, strict=True):
        loaded = wc.load(path, model=Branches())
        assert same_tensors(loaded, model if point in OLD else other), point
        wc.save(model, path)  # the next save clears up
        assert os.listdir(path.parent) == ["model"], point
        assert files(path) == files(directory), point
    for directory in first:  # interrupted first saves leave nothing that loads
        assert not directory.exists() and len(os.listdir(directory.parent)) == 1
        with pytest.raises(CheckpointError, match="not a directory"):
            wc.load(directory, model=Branches())
        wc.save(model, directory)
        assert os.listdir(directory.parent) == ["model"]
        assert isinstance(wc.load(directory, model=Branches()).q, WushLinear)
