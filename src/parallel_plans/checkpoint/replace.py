"""Replacing a checkpoint folder in one step: at any moment the old one or the new one is there, whole."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel_plans.checkpoint.files import WEIGHTS_NAME
from parallel_plans.errors import CheckpointError, Finding

AT_FDCWD = -100  # of linux/fcntl.h: paths count from the working directory
RENAME_EXCHANGE = 2  # of linux/fs.h: both paths exist and change places


@contextmanager
def replaced_folder(
    path: str | Path, weights_name: str = WEIGHTS_NAME, left_out: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """A fresh folder beside `path` that takes its place when the block ends.

    What the block did not write is carried over from the old folder, but for its weights of this name and their index,
    or for what `left_out` says instead.
    When the block raises, the fresh folder is removed and the old one is as it was.

    Raises:
        CheckpointError: a file stands at `path`, or the file system refuses (PP606).
    """
    target = Path(path).resolve()
    fresh = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
    with _refusals(target):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file stands where the folder is due")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
    try:
        yield fresh
        with _refusals(target):
            if target.exists():
                _carry_over(target, fresh, left_out or _old_weights(weights_name))
                shutil.copymode(target, fresh)
            _sync_tree(fresh)
            _put_in_place(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Says which folder could not be replaced, and why."""
    try:
        yield
    except OSError as error:
        message = f"the folder cannot be replaced: {error.strerror or error}"
        raise CheckpointError(Finding(code="PP606", message=message, file=str(target))) from error


def _old_weights(weights_name: str) -> re.Pattern[str]:
    """What the files of an earlier save are called: whole, in shards, and the index."""
    stem, _, suffix = weights_name.rpartition(".")
    return re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{re.escape(suffix)}(\.index\.json)?")


def _carry_over(old: Path, new: Path, left_out: re.Pattern[str] | None = None) -> None:
    """Gives `new` every file of `old` that it does not have, as a hard link where the file system has them."""
    for entry in sorted(os.scandir(old), key=lambda entry: entry.name):
        place = new / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if os.path.lexists(place) and not (is_folder and place.is_dir()):
            continue
        if entry.is_symlink():
            if not (left_out and left_out.fullmatch(entry.name)):
                os.symlink(os.readlink(entry.path), place)
        elif is_folder:
            place.mkdir(exist_ok=True)
            _carry_over(Path(entry.path), place)
        elif not (left_out and left_out.fullmatch(entry.name)):
            try:
                os.link(entry.path, place)
            except OSError:
                shutil.copy2(entry.path, place)


def _sync_tree(folder: Path) -> None:
    """Has every file and folder below `folder` reach the disk."""
    for root, _, files in os.walk(folder):
        for name in (*files, "."):
            path = os.path.join(root, name)
            if not os.path.islink(path):
                _sync(path)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(fresh: Path, target: Path) -> None:
    """Moves `fresh` to `target` and removes what was there."""
    if not target.exists():
        os.rename(fresh, target)
        _sync(target.parent)
        return
    old = fresh
    if not _exchanged(fresh, target):
        old = target.with_name(fresh.name.replace(".saving-", ".old-"))
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(old, target)
            raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new folder stands; what is left of the old one harms nobody


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two folders have changed places in one step; False where the system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0
