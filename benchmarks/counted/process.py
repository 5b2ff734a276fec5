"""What one process does to the machine, as the kernel counts it: memory, bytes out of files, time."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from pathlib import Path

EVERY = 0.002  # seconds between two looks at memory


def _anonymous() -> int:
    """Bytes of memory that no file stands behind."""
    return 1024 * _number("/proc/self/status", r"^RssAnon:\s+(\d+) kB")


def _fetched() -> int:
    """Bytes that disks have delivered because this process asked for them."""
    return _number("/proc/self/io", r"^read_bytes: (\d+)")


def _number(file: str, pattern: str) -> int:
    match = re.search(pattern, Path(file).read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None
    return int(match[1])


class Watch:
    """What happens to this process inside the block: seconds, and those on processors; the most anonymous memory above
    that at its beginning; bytes fetched from disks."""

    def __enter__(self) -> Watch:
        gc.collect()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = self._highest = _anonymous()
        self._fetched = _fetched()
        self._thread.start()
        self._cpu, self._started = time.process_time(), time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._is_over.wait(EVERY):
            self._highest = max(self._highest, _anonymous())

    def __exit__(self, *raised: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self._is_over.set()
        self._thread.join()
        self.anonymous = max(self._highest, _anonymous()) - self._before
        self.fetched = _fetched() - self._fetched


def forget(folder: Path) -> None:
    """Has the kernel drop the folder's files from its page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(folder: Path) -> None:
    """Has the kernel take the folder's files into its page cache."""
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(2**22)
            while opened.readinto(buffer):
                pass
