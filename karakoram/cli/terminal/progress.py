"""A progress bar with the time left, on stderr; where stderr is no terminal, nothing is drawn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function `report(done_bytes, total_bytes)` that moves the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function `report(done, total)`; a smaller count than before starts the next round."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task, rounds, last = progress.add_task(title, total=None), 1, 0

        def report(done: int, total: int) -> None:
            nonlocal rounds, last
            if done <= last:
                rounds += 1
                progress.reset(task)
            last = done
            progress.update(task, completed=done, total=total, description=f"{title}, round {rounds}")

        yield report
