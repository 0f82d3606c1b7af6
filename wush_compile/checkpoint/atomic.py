"""Replaces a directory atomically: after a kill at any moment its path holds either all old files or all new ones.

The new directory is written beside the old one as `.NAME.*.partial` and flushed to disk. One system call (Linux
`renameat2`) exchanges the two. File systems without that call need two renames: the old directory waits as
`.NAME.*.previous`, and `recover` moves it back if the second rename did not happen. A writer locks its partial
directory, and the system releases the lock when the writer exits. The next writer removes directories without a lock.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("wush_compile")
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def lock(descriptor: int, wait: bool = True) -> bool | None:
    """Takes an advisory lock on an open file or directory. Closing the descriptor releases the lock.

    Returns True if it was acquired, False if another process holds it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _locked(directory: Path, wait: bool = True) -> Iterator[bool]:
    """Holds an advisory lock on a directory during the block. Yields True if it was acquired."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield lock(descriptor, wait) is True
    finally:
        os.close(descriptor)


def _siblings(target: Path, suffix: str) -> list[Path]:
    prefix = f".{target.name}."
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(prefix) and p.name.endswith(suffix))


def _move_back(target: Path) -> None:
    """Undoes the first of two renames if the second did not happen. The caller holds the lock on the parent."""
    previous = _siblings(target, ".previous")
    if previous and not target.exists():
        log.warning("an interrupted save had moved %s aside: moved back", target)
        os.rename(previous[-1], target)


def recover(directory: str | os.PathLike) -> Path:
    """The real path of a directory. If a killed writer left the directory aside, it is moved back first."""
    target = Path(os.path.realpath(directory))
    if not target.exists() and target.parent.is_dir() and _siblings(target, ".previous"):
        with _locked(target.parent):
            _move_back(target)
    return target


def _remove_leftovers(target: Path) -> None:
    for leftover in _siblings(target, ".partial") + _siblings(target, ".previous"):
        with contextlib.suppress(OSError), _locked(leftover, wait=False) as unused:
            if unused:
                shutil.rmtree(leftover)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Replaces a file atomically: yields a path to write the new file to.

    After a kill at any moment `path` holds the old file or the new one. After the block the new file survives a power
    cut. Only one writer at a time is allowed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def _flush_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            flush(Path(directory, name))
        flush(Path(directory))


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two directories in one step. Returns False if the system or the file system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _install(partial: Path, target: Path, token: str) -> None:
    """Moves a flushed directory to `target`. An old one ends at the path of `partial`, or is removed."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(partial, target)  # replaces an empty directory too
    elif not _exchange(partial, target):
        previous = target.parent / f".{target.name}.{token}.previous"
        os.rename(target, previous)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(previous, target)
            raise
        flush(target.parent)
        shutil.rmtree(previous)
    flush(target.parent)


@contextlib.contextmanager
def replaced_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Replaces a directory atomically: yields an empty directory to write the new files into.

    An exception in the block, or a kill before its end, leaves `directory` as it was.
    """
    target = recover(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = target.parent / f".{target.name}.{token}.partial"
    with contextlib.ExitStack() as stack:
        with _locked(target.parent):  # no other writer sees `partial` before it is locked
            _remove_leftovers(target)
            partial.mkdir()
            if target.exists():
                shutil.copymode(target, partial)
            stack.enter_context(_locked(partial))
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial
        _flush_tree(partial)
        with _locked(target.parent):
            _install(partial, target, token)
