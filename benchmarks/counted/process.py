"""What one process does to the machine, as the kernel counts it: memory, bytes out of files, time."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from pathlib import Path

EVERY = 0.002  # seconds between two looks at memory


def _status(*names: str) -> list[int]:
    """Bytes that /proc/self/status says under these names."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return [int(match[1]) * 1024 if (match := re.search(rf"{name}:\s+(\d+) kB", text)) else 0 for name in names]


def _io(name: str) -> int:
    match = re.search(rf"^{name}: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None
    return int(match[1])


class Watch:
    """What happens to this process inside the block: time, the highest anonymous memory, bytes out of files."""

    def __enter__(self) -> Watch:
        gc.collect()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = _status("RssAnon", "RssFile")
        self._highest = list(self._before)
        self._delivered, self._fetched = _io("rchar"), _io("read_bytes")
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._is_over.wait(EVERY):
            self._take()

    def _take(self) -> None:
        self._highest = list(map(max, self._highest, _status("RssAnon", "RssFile")))

    def __exit__(self, *raised: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._is_over.set()
        self._thread.join()
        self._take()
        self.fetched = _io("read_bytes") - self._fetched
        delivered = _io("rchar") - self._delivered
        self.anonymous, mapped = (high - low for high, low in zip(self._highest, self._before, strict=True))
        self.taken = delivered + mapped


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
