"""Several callers at once, forked and spawned processes, and a system that gives no more threads."""

import gc
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from karakoram.errors import InputError
from karakoram.kernels import muon, ops
from karakoram.kernels.cpu.library import Library
from tests.kernels import drawn

CALLERS, CALLS = 8, 20
PATIENCE_S = 120  # a process that hangs is killed


class Work:
    """Something to compute, with the bytes that must come out: sizes differ, so that callers do not run in step."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.x, self.experts = drawn.rows(3 + 5 * seed, 96), drawn.experts(4, 96, 64)
        self.ids, self.weights = drawn.routing(len(self.x), 4, 2)
        self.cache, self.lengths = drawn.rows(700, 96).view(1, 700, 96), torch.tensor([690 - seed])
        self.stack = drawn.rows(2 * (130 + seed), 140).view(2, 130 + seed, 140)
        self.expected = self.compute()

    def compute(self) -> bytes:
        step = ops.MoeSteps(self.x, self.ids, self.weights, 4, 64)
        step.experts([3, 1], [self.experts.records[3], self.experts.records[1]])
        step.experts([0, 2], [self.experts.records[0], self.experts.records[2]])
        values = ops.mla_decode(self.x[None, :3], self.cache, self.lengths, 64, 0.1)
        whole = ops.moe_int4(self.x, self.ids, self.weights, self.experts)
        made = [step.finish(), values, whole]
        if muon.library() is not None:  # torch's products may hang in a forked child
            made.append(muon.newton_schulz(self.stack, torch.full((2,), 200.0), [(3.4445, -4.7750, 2.0315)]))
        return b"".join(y.view(torch.int16).numpy().tobytes() for y in made)

    def right(self, times: int) -> bool:
        return all(self.compute() == self.expected for _ in range(times))


@pytest.fixture(scope="module")
def works(lib: Library) -> list[Work]:
    return [Work(seed) for seed in range(CALLERS)]


def test_eight_callers_at_once(works: list[Work]) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        assert all(pool.map(lambda work: work.right(CALLS), works))


def test_while_the_number_of_threads_changes(works: list[Work]) -> None:
    lib, before = ops.chosen("cpu"), ops.chosen("cpu").threads  # type: ignore[union-attr]
    try:
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(work.right, 3 * CALLS) for work in works[:4]]
            change = 0
            while not all(result.done() for result in results):
                lib.choose_threads(1 + change % before)  # type: ignore[union-attr]
                change += 1
            assert all(result.result() for result in results)
    finally:
        lib.choose_threads(before)  # type: ignore[union-attr]


def test_an_error_is_told_to_the_thread_that_made_it(works: list[Work]) -> None:
    def wrong(seed: int) -> bool:
        for _ in range(CALLS):
            with pytest.raises(InputError, match=f"x has {seed} columns"):
                ops.linear(drawn.rows(1, seed), weight)
        return True

    weight = drawn.matrix("bf16", 16, 64)
    with ThreadPoolExecutor(CALLERS) as pool:
        assert all(pool.map(wrong, range(1, 1 + CALLERS)))


def in_another_process(method: str, target: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context(method).Process(target=target)
    process.start()
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"the process ({method}) did not end")
    return process.exitcode


def compute_in_a_new_process() -> None:
    """Where nothing is loaded yet."""
    works = [Work(seed) for seed in range(2)]
    raise SystemExit(0 if all(work.right(2) for work in works) else 1)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS forbids such forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork(works: list[Work]) -> None:
    def child() -> None:
        raise SystemExit(0 if works[0].right(3) and works[1].right(3) else 1)

    assert works[0].right(1)  # the pool is running
    assert in_another_process("fork", child) == 0
    assert works[0].right(1)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS forbids such forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork_in_the_middle_of_a_call(works: list[Work]) -> None:
    """Another thread holds the library's locks at the moment of the fork; nobody will release them in the child."""

    def child() -> None:
        raise SystemExit(0 if works[0].right(3) else 1)

    over = threading.Event()

    def busy() -> bool:
        right = True
        while not over.is_set():
            right = right and works[1].right(1)
        return right

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(busy)
        try:
            codes = [in_another_process("fork", child) for _ in range(5)]
        finally:
            over.set()
        assert codes == [0] * 5
        assert result.result()


def test_in_a_spawned_process(lib: Library) -> None:
    assert in_another_process("spawn", compute_in_a_new_process) == 0


def test_dropping_unfinished_experts_frees_them(lib: Library) -> None:
    """Begun and never finished: 25 MB each, which a leak would make 2.5 GB of."""
    x, (ids, weights) = drawn.rows(512, 2048), drawn.routing(512, 4, 4)

    def mapped_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to see memory in")
    before = mapped_bytes()
    for _ in range(100):
        step = ops.MoeSteps(x, ids, weights, 4, 64)
        del step
    gc.collect()
    assert mapped_bytes() - before < 1 << 30


NO_MORE_THREADS = """
import resource
from tests.kernels import drawn
from karakoram.kernels import muon, ops
lib = ops.chosen("cpu")
with ops.using(threads=1):
    x, weight = drawn.rows(40, 256), drawn.matrix("int4", 400, 256)
    expected = ops.linear(x, weight)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 20), resource.RLIM_INFINITY))  # a thread's stack takes 8 MB
found = ops.linear(x, weight)
print(lib.threads, bool((found == expected).all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by Linux's rules")
def test_without_any_more_threads_it_works_alone(lib: Library, project_root: Path) -> None:
    if lib.threads < 2:
        pytest.skip("this process may use one core only")
    done = subprocess.run(
        [sys.executable, "-c", NO_MORE_THREADS],
        cwd=project_root,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout.split() == ["1", "True"], done.stderr
