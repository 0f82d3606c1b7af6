"""The output directory of a run: a journal while the run works, the checkpoint once it has finished.

    DIR/.wush/manifest.json       the run: configuration, sha256 of data and model, solver, micro-batch, environment
    DIR/.wush/stage-00003.json    a finished stage: its groups, their reports, the name and the sha256 of its shard
    DIR/.wush/model-00003-of-*    the stage's shard: its quantized linears, and its other tensors unchanged
    DIR/.wush/final/              config.json and the other settings, written when every stage is finished

Every file appears whole or not at all. A stage is finished once its JSON exists. At the end, the shards move up into
DIR, then the other files, then the index, and config.json last. So a DIR that is not finished does not load. The
manifest and the stages' JSON stay for a later run of the same command. The running process holds a lock on
DIR/.wush/lock; the system releases it when the process exits.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint.atomic import flush, lock, replaced_file
from ..checkpoint.files import CONFIG, DIGEST, INDEX, JOURNAL, WEIGHT_FILE, Shards, digest, read_config, sha256_of
from ..checkpoint.layout import build_groups, join_rows, parts, split_group
from ..checkpoint.record import Quantization
from ..config import WushConfig
from ..errors import CheckpointError, ConfigError
from ..modules import WushGroup
from ..passes.calibration.group import LinearGroup
from ..solver.solution import REVISION
from .ranks import SingleProcess
from .tensors import ModelTensors

log = logging.getLogger("wush_compile")
MANIFEST, LOCK, FINAL = "manifest.json", "lock", "final"


class Journal:
    """A run's journal, a context manager.

    The journal holds its lock during the block. If the block fails before a stage with groups is finished, the journal
    is removed.

    directory   the directory of the future checkpoint
    restart     whether to delete what an earlier run left
    writes      whether this process writes; the other ranks only read
    """

    def __init__(self, directory: str | os.PathLike, restart: bool = False, writes: bool = True):
        self.target = Path(os.path.realpath(directory))
        self.path, self._restart, self._writes = self.target / JOURNAL, restart, writes
        self._lock: int | None = None
        self._manifest: dict = {}
        self._shards = Shards()
        self._writer, self._written = ThreadPoolExecutor(1), None

    def __enter__(self) -> "Journal":
        if not self._writes:
            return self
        self._check_target()
        self._made = not self.target.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            if self._restart:
                self._clear()
            for leftover in (*self.path.glob(".*.partial"), *self.path.glob("final/.*.partial")):
                leftover.unlink()
        except OSError as error:
            self._unlock()
            raise CheckpointError(
                f"{self.target} cannot be written ({error.strerror}): give another directory"
            ) from error
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._writer.shutdown()
        try:
            if self._lock is not None and kind is not None and not self._keeps_something():
                shutil.rmtree(self.path)
                if self._made:
                    self.target.rmdir()
        except (OSError, CheckpointError):
            pass  # the error of the run is the one to report
        finally:
            self._unlock()

    def _keeps_something(self) -> bool:
        return any(self._read(path)["groups"] for path in self.path.glob("stage-*.json"))

    def _check_target(self) -> None:
        if self.target.exists() and not self.target.is_dir():
            raise CheckpointError(f"{self.target} is a file: give a directory")
        if self.target.is_dir() and any(self.target.iterdir()) and not self.path.is_dir():
            try:
                read_config(self.target)
            except CheckpointError:
                raise CheckpointError(
                    f"{self.target} is not empty and holds no wush checkpoint: give a new directory, or empty it first"
                ) from None

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            held = lock(descriptor, wait=False)
            if held is None:
                return descriptor  # a file system without locks
            if not held:
                os.close(descriptor)
                raise CheckpointError(f"another run is writing {self.target}: wait for it, or give another directory")
            # A run that failed removes its journal, so the locked file may no longer be the one at this path.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path / LOCK).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)
            self.path.mkdir(parents=True, exist_ok=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self.target} could not be written ({getattr(error, 'strerror', None) or error}); finished layers "
                "are kept: free some space and give the same command again"
            ) from error

    def _write_json(self, path: Path, value: object) -> None:
        with self._writing(), replaced_file(path) as partial:
            partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    # -- the manifest ------------------------------------------------------------------------------------------------

    def begin(
        self,
        model: nn.Module,
        config: WushConfig,
        names: Mapping[str, str],
        identity: Mapping[str, str],
        environment: Mapping[str, object],
        batch_size: int | None,
    ) -> None:
        """Checks that an existing journal belongs to this run. Otherwise starts one.

        names        the name of every saved parameter and buffer -> its name in the checkpoint
        identity     the sha256 of `data` and of `model`; a difference raises a `ConfigError` that names it
        environment  what may change the last bit of a result; a difference is logged as a warning
        """
        self._model, self._config, self._names = model, config, names
        identity = {"config": config.to_dict(), "solver": REVISION, **identity}
        found = self._read(self.path / MANIFEST)
        if found is None:
            self._manifest = {
                **identity,
                "environment": dict(environment),
                "batch_size": batch_size,
                "micro_batch": batch_size,
                "events": [],
            }
            if self._writes:
                self._write_json(self.path / MANIFEST, self._manifest)
            return
        for difference in self._differences(found, identity, batch_size):
            raise ConfigError(
                f"{self.target} was begun with {difference}: give the same, another directory, or --restart "
                "(restart=True)"
            )
        for name, value in environment.items():
            if found["environment"].get(name) != value:
                log.warning(
                    "%s was begun with %s %s, now it is %s: the remaining layers may differ in the last bit",
                    self.target,
                    name,
                    found["environment"].get(name),
                    value,
                )
        self._manifest = found

    @staticmethod
    def _differences(found: Mapping, now: Mapping, batch_size: int | None) -> Iterator[str]:
        if found.get("solver") != now["solver"]:  # first: the other version may lack a setting
            yield "another version's solver, whose codes differ"
        for name, value in now["config"].items():
            if found["config"].get(name) != value:
                yield f"{name} {found['config'].get(name)!r}, not {value!r}"
        for name in now:
            if name not in ("config", "solver") and found.get(name) != now[name]:
                yield f"other {name} (sha256 {str(found.get(name))[:12]}, not {now[name][:12]})"
        if batch_size is not None and batch_size not in (found["batch_size"], found["micro_batch"]):
            yield f"batch size {found['micro_batch'] or 'as given'}, not {batch_size}"

    @staticmethod
    def _read(path: Path) -> dict | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise CheckpointError(f"{path} is not JSON: start over with --restart (restart=True)") from None

    def remember(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns tensors from the journal, or calls `make` and keeps the result in the journal."""
        path = self.path / f"{name}.safetensors"
        if path.exists():
            shards = Shards([path])
            return shards.tensors(shards.specs)
        tensors = make()
        if self._writes:
            with self._writing(), replaced_file(path) as partial:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        return tensors

    def micro_batch(self, choose: Callable[[], int | None]) -> int | None:
        """Returns the recorded micro-batch size. If none has been recorded yet, records what `choose` returns."""
        if self._manifest["micro_batch"] is None and "chosen" not in self._manifest:
            self._manifest |= {"micro_batch": choose(), "chosen": True}
            if self._writes:
                self._write_json(self.path / MANIFEST, self._manifest)
        return self._manifest["micro_batch"]

    def shrink(self, stage: str, batch_size: int) -> None:
        """Records that memory ran out, and the smaller micro-batch size from this stage on."""
        self._manifest["micro_batch"] = batch_size
        self._manifest["events"].append({"stage": stage, "micro_batch": batch_size, "reason": "out of memory"})
        if self._writes:
            self._write_json(self.path / MANIFEST, self._manifest)

    # -- stages ------------------------------------------------------------------------------------------------------

    def lay_out(self, uses: list[set[str]], groups: list[list[LinearGroup]], tensors: ModelTensors) -> None:
        """Assigns every tensor of the checkpoint to the shard of the first stage that uses it.

        A tensor that no stage uses goes to the last shard.

        uses    for each stage, the names of the parameters and buffers in its graph
        groups  for each stage, the groups that it solves
        """
        linears = [linear for own in groups for group in own for linear in group.linears]
        modules = tuple(f"{n}." for one in linears if one.experts is None for n in (one.name, *one.embeddings))
        weights = {name for linear in linears if linear.experts for name in (linear.weight, linear.bias)}
        left = dict.fromkeys(n for n in self._names.values() if not n.startswith(modules) and n not in weights)
        self._others: list[list[str]] = []
        for used in uses:
            own = sorted({self._names[name] for name in used if name in self._names} & left.keys())
            self._others.append(own)
            for name in own:
                del left[name]
        self._others[-1] = sorted([*self._others[-1], *left])
        filled = [k for k, own in enumerate(groups) if own or self._others[k]]
        self._file_names = {k: f"model-{i:05d}-of-{len(filled):05d}.safetensors" for i, k in enumerate(filled, start=1)}
        self._stages, self._tensors = len(uses), tensors

    def _record(self, number: int) -> Path:
        return self.path / f"stage-{number:05d}.json"

    def _file(self, name: str) -> Path:
        """Returns the path of a shard, which is in the journal or already in the checkpoint."""
        waiting = self.path / name
        return waiting if waiting.exists() else self.target / name

    def finished(self) -> int:
        """Returns how many stages are finished. Checks the sha256 of their files."""
        before = ""
        for number in range(self._stages):
            record = self._read(self._record(number))
            if record is None or record["after"] != before:
                return number
            if record["file"] is not None:
                path = self._file(record["file"])
                if not path.exists() or sha256_of(path) != record["sha256"]:
                    log.warning("%s is damaged or missing: its stage runs again", path)
                    return number
                self._shards.add(path)
            before = sha256_of(self._record(number))
        return self._stages

    def restore(self, group: LinearGroup, number: int, home: torch.device) -> tuple[WushGroup, dict]:
        """Returns a solved group of a finished stage on `home`, and its report. On the meta device it has no values."""
        entry = self._read(self._record(number))["groups"][group.name]
        record = Quantization(self._config, [], {})
        members = [m.name for m in group.linears]
        record.groups.append(
            record.describe(members, entry["transform_block_size"], group.recipe, group.experts, group.embeddings)
        )
        [solved] = build_groups(self._model, record, self._shards.specs)
        if home.type != "meta":
            for name, buffer in self.buffers(solved):
                setattr(solved, name, buffer.to(home))
        return solved, entry["report"]

    def buffers(self, group: WushGroup) -> list[tuple[str, Tensor]]:
        """Returns (name, values) of a committed group's buffers, on the CPU."""
        return [
            (buffer, join_rows(group, buffer, self._shards.tensors([name for name, _ in stored])))
            for buffer, stored in parts(group)
        ]

    def commit(self, number: int, solved: Mapping[str, object]) -> None:
        """Starts to write a stage's shard and then its record, in a thread.

        solved   the stage's `Solved` groups by name
        """
        self._pending = number
        if self._writes:
            tensors = self._tensors.load(self._others[number], torch.device("cpu"))
            for one in solved.values():
                tensors |= {key: tensor.cpu() for key, tensor in split_group(one.group).items()}
            groups = {
                key: {"transform_block_size": one.group.block_size, "report": one.report} for key, one in solved.items()
            }
            self._written = self._writer.submit(self._store, number, tensors, groups)

    def _store(self, number: int, tensors: dict[str, Tensor], groups: dict) -> None:
        name, sha = self._file_names.get(number), None
        if name is not None:
            with self._writing(), replaced_file(self.path / name) as partial:
                save_file({key: _own(tensor) for key, tensor in tensors.items()}, partial, metadata={"format": "pt"})
            sha = sha256_of(self.path / name)
        after = sha256_of(self._record(number - 1)) if number else ""
        self._write_json(self._record(number), {"after": after, "file": name, "sha256": sha, "groups": groups})

    def settle(self, ranks: SingleProcess) -> None:
        """Waits, on every rank, until the committed stage is finished."""
        if self._written is not None:
            self._written.result()
        ranks.smallest(self._pending)
        name = self._file_names.get(self._pending)
        if name is not None and (self.path / name).exists():
            self._shards.add(self.path / name)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, record: Quantization, write: Callable[[Path, str], None]) -> None:
        """Turns the journal of a finished run into the checkpoint.

        write   write(directory, digest) writes config.json and every other file that holds no weights
        """
        if not self._writes or self._complete():
            return
        shards = [name for name in map(self._file_names.get, range(self._stages)) if name is not None]
        settings = record.to_dict()
        final = self.path / FINAL
        with self._writing():
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            sha = digest(settings, self._shards.specs, self._shards.tensor)
            write(final, sha)
            for path in final.iterdir():
                flush(path)
            self._manifest["digest"] = sha
            self._write_json(self.path / MANIFEST, self._manifest)
            (self.target / CONFIG).unlink(missing_ok=True)
            flush(self.target)
            for path in self.target.iterdir():
                if WEIGHT_FILE.fullmatch(path.name) and path.name not in shards:
                    path.unlink()
            for name in shards:
                if (self.path / name).exists():
                    os.replace(self.path / name, self.target / name)
            for path in sorted(final.iterdir()):
                if path.name != CONFIG:
                    os.replace(path, self.target / path.name)
        self._write_json(self.target / INDEX, self._shards.index())
        with self._writing():
            os.replace(final / CONFIG, self.target / CONFIG)
            final.rmdir()
            flush(self.target)

    def _complete(self) -> bool:
        try:
            found = read_config(self.target)[DIGEST]
        except (CheckpointError, KeyError):
            return False
        waiting = any((self.path / name).exists() for name in self._file_names.values())
        return found == self._manifest.get("digest") and not waiting


def _own(tensor: Tensor) -> Tensor:
    """Returns a contiguous tensor whose storage holds nothing else."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
