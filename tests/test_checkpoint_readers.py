"""Laws of reading with several threads: bounded bytes at once, the same result and the same error always."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_plans.checkpoint import files
from parallel_plans.checkpoint.files import Checkpoint, open_checkpoint
from parallel_plans.checkpoint.lazy import LazyTensor
from parallel_plans.checkpoint.readers import run_jobs
from parallel_plans.checkpoint.sources import JOB_BYTES, Job
from parallel_plans.errors import CheckpointError


def ignore(size: int) -> None:
    """No progress bar."""


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_as_many_jobs_overlap_as_there_are_readers_and_no_more(readers: int) -> None:
    together = threading.Barrier(readers)
    lock, running, most = threading.Lock(), 0, 0

    def run() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=60)  # no job goes on until all readers have one
        with lock:
            running -= 1

    run_jobs((Job(1, run) for _ in range(3 * readers)), ignore, readers)
    assert most == readers


def test_a_job_is_made_when_a_reader_is_free_for_it() -> None:
    made, done, ahead = 0, 0, 0
    lock = threading.Lock()

    def run() -> None:
        nonlocal done
        time.sleep(0.001)
        with lock:
            done += 1

    def jobs() -> Iterator[Job]:
        nonlocal made, ahead
        for _ in range(50):
            made += 1
            ahead = max(ahead, made - done)
            yield Job(1, run)

    run_jobs(jobs(), ignore, 3)
    assert done == 50
    assert ahead <= 3


@pytest.mark.parametrize("later", [0.0, 0.02])
def test_the_first_error_is_raised_however_threads_run(later: float) -> None:
    taken: list[int] = []

    def job(place: int) -> Job:
        def run() -> None:
            taken.append(place)
            if place in (5, 6, 7):
                time.sleep(later if place == 5 else 0.0)
                raise ValueError(f"job {place}")
            if place > 7:
                time.sleep(0.002)  # so that the threads that fail get to say so

        return Job(1, run)

    for _ in range(10):
        with pytest.raises(ValueError, match="job 5"):
            run_jobs(map(job, range(1000)), ignore, 4)
    assert max(taken) < 500  # nothing is begun once something is wrong


def test_an_error_in_what_makes_the_jobs_comes_after_those_of_jobs_before() -> None:
    def jobs(fails: bool) -> Iterator[Job]:
        def run() -> None:
            time.sleep(0.01)
            if fails:
                raise ValueError("a job")

        yield Job(1, run)
        raise KeyError("no more jobs")

    with pytest.raises(KeyError, match="no more jobs"):
        run_jobs(jobs(False), ignore, 2)
    with pytest.raises(ValueError, match="a job"):
        run_jobs(jobs(True), ignore, 2)


def test_progress_adds_up_to_the_bytes_of_all_jobs() -> None:
    told: list[int] = []
    run_jobs((Job(size, lambda: None) for size in range(100)), told.append)
    assert sorted(told) == list(range(100))


def saved(folder: Path) -> dict[str, Tensor]:
    tensors = {
        "whole": torch.randn(40, 300).bfloat16(),
        "deep": torch.randn(3, 50, 70),
        "row": torch.randn(1, 9000),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(7.5),
        "flags": torch.rand(999) > 0.5,
        "eighth": torch.randn(64, 64).to(torch.float8_e4m3fn),
    }
    save_file(tensors, folder / "x.safetensors")
    return tensors


REGIONS = {
    "all": lambda shape: [((0, size),) for size in shape],
    "rows": lambda shape: [((size // 3, size),) if dim == 0 else ((0, size),) for dim, size in enumerate(shape)],
    "columns": lambda shape: [
        ((0, size // 2),) if dim + 1 == len(shape) else ((0, size),) for dim, size in enumerate(shape)
    ],
    "few columns": lambda shape: [
        ((0, size // 8),) if dim + 1 == len(shape) else ((0, size),) for dim, size in enumerate(shape)
    ],
    "packed": lambda shape: [((0, size // 4), (size // 2, size // 2 + size // 4)) for size in shape],
}


@pytest.mark.parametrize("job_bytes", [1, 1000, JOB_BYTES])
@pytest.mark.parametrize("region", REGIONS)
def test_jobs_of_any_size_in_any_order_read_the_same(
    tmp_path: Path, region: str, job_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_plans.checkpoint.lazy.JOB_BYTES", job_bytes)
    for name, tensor in saved(tmp_path).items():
        wanted = REGIONS[region](tensor.shape)
        picked = tensor
        for dim, ranges in enumerate(wanted):
            places = [place for start, stop in ranges for place in range(start, stop)]
            picked = picked.view(torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype)
            picked = picked.index_select(dim, torch.tensor(places, dtype=torch.long))
        picked = picked.view(tensor.dtype)
        with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
            read = torch.empty(picked.shape, dtype=tensor.dtype)
            jobs = list(checkpoint.tensors[name].jobs_into(read, wanted))
            for job in reversed(jobs):
                job.run()
            assert read.view(torch.uint8).equal(picked.view(torch.uint8)) if tensor.ndim else read.equal(picked)
            assert sum(job.nbytes for job in jobs) == checkpoint.bytes_read == picked.numel() * tensor.dtype.itemsize


def test_no_job_writes_more_than_a_bounded_number_of_bytes(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(5, 3 * JOB_BYTES // 8 + 1)}, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        lazy: LazyTensor = checkpoint.tensors["large"]
        sizes = [job.nbytes for job in lazy.jobs_into(torch.empty(lazy.shape), [((0, size),) for size in lazy.shape])]
    assert sum(sizes) == lazy.nbytes
    assert len(sizes) == 5
    assert max(sizes) <= 2 * JOB_BYTES  # a row is not cut


def delivered(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, region: str) -> tuple[int, int]:
    """Bytes that `read` and its kin give while a region of a file is read, and bytes of the region."""
    save_file({"x": torch.zeros(shape, dtype=dtype)}, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        lazy = checkpoint.tensors["x"]
        wanted = REGIONS[region](shape)
        read = torch.empty([sum(stop - start for start, stop in ranges) for ranges in wanted], dtype=dtype)
        before, own = counted(), counted()
        own -= before  # what it costs to ask
        for job in lazy.jobs_into(read, wanted):
            job.run()
        return counted() - before - 2 * own, read.numel() * dtype.itemsize


def counted() -> int:
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count")
@pytest.mark.parametrize("region", ["all", "rows"])
def test_what_lies_together_is_read_by_the_kernel_to_its_place_and_nothing_else(tmp_path: Path, region: str) -> None:
    got, wanted = delivered(tmp_path, (300, 500), torch.bfloat16, region)
    assert abs(got - wanted) < 20  # the number that is read grows by a digit or two


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count")
@pytest.mark.parametrize(("width", "reads"), [(800, 8), (80_000, 0)])
def test_short_rows_are_read_once_and_of_long_ones_only_the_pages_that_are_needed(
    tmp_path: Path, width: int, reads: int
) -> None:
    got, wanted = delivered(tmp_path, (30, width), torch.bfloat16, "few columns")
    assert abs(got - reads * wanted) < 20  # the others come out of the memory map


def test_a_file_that_is_cut_while_it_is_read_is_a_clear_error(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "x.safetensors"
    with open_checkpoint([path]) as checkpoint:
        os.truncate(path, path.stat().st_size - 40_000)
        parts = {name: torch.empty(lazy.shape, dtype=lazy.dtype) for name, lazy in checkpoint.tensors.items()}
        jobs = (
            job
            for name, lazy in checkpoint.tensors.items()
            for job in lazy.jobs_into(parts[name], [((0, size),) for size in lazy.shape])
        )
        with pytest.raises(CheckpointError, match=r"x\.safetensors ends within a tensor \[PP603\]") as error:
            run_jobs(jobs, ignore)
        assert error.value.findings[0].name in checkpoint.tensors


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, read = saved(tmp_path), os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:100]], offset))
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        assert torch.equal(checkpoint.tensors["whole"].read(), tensors["whole"])


def test_an_error_of_a_reader_names_the_tensor_and_leaves_no_thread_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    before = threading.active_count()

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        lazy = checkpoint.tensors["deep"]
        monkeypatch.setattr(os, "preadv", broken)
        jobs = lazy.jobs_into(torch.empty(lazy.shape), [((0, size),) for size in lazy.shape])
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: Input/output error") as error:
            run_jobs(jobs, ignore)
    assert error.value.findings[0].name == "deep"
    assert threading.active_count() == before


WHOLE = [((0, 300),), ((0, 500),)]


@contextmanager
def lent(folder: Path) -> Iterator[tuple[Checkpoint, Tensor, Tensor, list[Job]]]:
    """A checkpoint, its tensor as it was saved and as it is lent, and the jobs that bring it."""
    tensor = torch.randn(300, 500).bfloat16()
    save_file({"w": tensor, "small": torch.zeros(10)}, folder / "x.safetensors")
    with open_checkpoint([folder / "x.safetensors"]) as checkpoint:
        found = checkpoint.tensors["w"].lent(WHOLE, torch.bfloat16)
        if found is None:
            pytest.skip("the kernel cannot be asked for pages of a file")
        yield checkpoint, tensor, found[0], list(found[1])


def test_a_lent_part_is_the_files_own_memory_and_outlives_it(tmp_path: Path) -> None:
    with lent(tmp_path) as (checkpoint, tensor, part, jobs):
        run_jobs(iter(jobs), ignore)
        assert sum(job.nbytes for job in jobs) == checkpoint.bytes_read == tensor.nbytes
    (tmp_path / "x.safetensors").unlink()
    assert part.equal(tensor)
    assert part.untyped_storage().nbytes() == tensor.nbytes  # what `torch.save` writes


def test_what_is_written_to_a_lent_part_stays_with_the_process(tmp_path: Path) -> None:
    with lent(tmp_path) as (_, tensor, part, _):
        part.zero_()
        assert load_file(tmp_path / "x.safetensors")["w"].equal(tensor)
        assert not part.any()


def test_only_what_lies_in_the_file_as_it_is_to_lie_in_memory_is_lent(tmp_path: Path) -> None:
    with lent(tmp_path) as (checkpoint, tensor, _, _):
        lazy = checkpoint.tensors["w"]
        rows = lazy.lent([((100, 200),), ((0, 500),)], torch.bfloat16)
        assert rows is not None
        assert rows[0].equal(tensor[100:200])
        assert lazy.lent([((0, 300),), ((0, 250),)], torch.bfloat16) is None
        assert lazy.lent(WHOLE, torch.float32) is None
        assert lazy.lent([((0, 100), (200, 300)), ((0, 500),)], torch.bfloat16) is None
        assert checkpoint.tensors["small"].lent([((0, 10),)], torch.float32) is None


def test_a_lent_part_of_a_file_that_was_cut_is_a_clear_error(tmp_path: Path) -> None:
    with lent(tmp_path) as (_, _, _, jobs):
        os.truncate(tmp_path / "x.safetensors", 10_000)
        with pytest.raises(CheckpointError, match=r"x\.safetensors ends within a tensor \[PP603\]") as error:
            run_jobs(iter(jobs), ignore)
        assert error.value.findings[0].name == "w"
