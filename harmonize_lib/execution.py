"""One notebook executed by papermill, in a process that does nothing else; started as a script by ``runner``.

Nothing of the library is imported here: the kernel does that, and a process without torch starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout
from papermill.exceptions import PapermillExecutionError

LOCK_SECONDS = 60  # how long to wait for another process that still executes the same notebook
DEAD_AT_START = "the kernel died at its start"
MARK = "papermill-error-cell-tag"  # papermill removes cells that carry it when the notebook is executed again


def lock_of(target: Path) -> Path:
    """Lock held while a notebook is executed.

    Parameters
    ----------
    target : Path
        Where the executed notebook is kept.

    Returns
    -------
    Path
        A hidden file beside it.
    """
    return target.with_name(f".{target.stem}.lock")


def failed_cell(book: Any) -> int | None:
    """The cell at which a notebook stopped.

    Parameters
    ----------
    book : Any
        A notebook saved by papermill.

    Returns
    -------
    int | None
        Index of the first cell marked failed, else of the last that was begun: when the kernel is killed papermill
        marks every cell completed, but only those that were begun have a start time. None where none was begun.
    """
    told = [cell.metadata.get("papermill", {}) for cell in book.cells]
    failed = [index for index, cell in enumerate(told) if cell.get("status") == "failed"]
    begun = [index for index, cell in enumerate(told) if cell.get("start_time")]
    return failed[0] if failed else begun[-1] if begun else None


def not_executed(book: Any) -> int | None:
    """The first cell without an execution, for a notebook that papermill calls finished.

    Parameters
    ----------
    book : Any
        A notebook saved by papermill.

    Returns
    -------
    int | None
        Index of a code cell that was not begun or not completed, e.g. below ``sys.exit(0)``; None where all were.
    """
    for index, cell in enumerate(book.cells):
        told = cell.metadata.get("papermill", {})
        done = told.get("start_time") and told.get("status") == "completed"
        if cell.cell_type == "code" and cell.source.strip() and not done:
            return index
    return None


def keep_failed(source: Path, partial: Path, target: Path, error: str) -> dict[str, Any]:
    """Keep a notebook that failed, stamped as such in its metadata, its cells and its first lines.

    Parameters
    ----------
    source : Path
        The notebook that was to be executed; kept in place of a partial copy that cannot be read.
    partial : Path
        What papermill had saved.
    target : Path
        Where it is kept.
    error : str
        One line.

    Returns
    -------
    dict[str, Any]
        ``state`` (``"failed"``), ``cell`` (n of ``In [n]``, None where no cell was begun) and ``error``.
    """
    try:
        book = nbformat.read(partial, as_version=4)
    except Exception:  # half written or not there: papermill does not save atomically
        book = nbformat.read(source, as_version=4)
    place = failed_cell(book)
    result: dict[str, Any] = {"state": "failed", "cell": None, "error": error}
    for index, cell in enumerate(book.cells):
        told = cell.metadata.setdefault("papermill", {})
        if place is None or index > place:
            told |= {"status": "pending"}
        elif index == place:
            told |= {"status": "failed", "exception": True}
            before = [other for other in book.cells[:place] if other.cell_type == "code" and other.source.strip()]
            result["cell"] = len(before) + 1
    book.metadata.setdefault("papermill", {})["exception"] = True
    book.metadata["harmonize"] = result
    if not any(MARK in cell.metadata.get("tags", []) for cell in book.cells):
        where = f"in `In [{result['cell']}]`" if result["cell"] else "before its first cell"
        text = f"**This run failed** {where}: {error}"
        book.cells.insert(0, nbformat.v4.new_markdown_cell(text, metadata={"tags": [MARK]}))
    partial.write_text(nbformat.writes(book), encoding="utf-8")
    os.replace(partial, target)
    return result


def execute(job: dict[str, Any], stopped: list[str]) -> dict[str, Any]:
    """Execute a notebook into a partial copy that is renamed when it is whole.

    Parameters
    ----------
    job : dict[str, Any]
        ``source`` and ``target``, paths of notebooks, and ``parameters``.
    stopped : list[str]
        Holds the reason once the process was told to stop.

    Returns
    -------
    dict[str, Any]
        ``state``: ``"finished"``, or what :func:`keep_failed` gives.
    """
    source, target = Path(job["source"]), Path(job["target"])
    partial = target.with_suffix(".partial.ipynb")
    for last_try in (False, True):
        partial.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(_literal(source), _literal(partial), job["parameters"])
            book = nbformat.read(partial, as_version=4)
            place = not_executed(book)
            if place is None:
                os.replace(partial, target)
                return {"state": "finished"}
            error = "stopped before its end without an error (sys.exit?)"
        except BaseException as problem:  # also KeyboardInterrupt: whatever ended it, the notebook says so
            error = stopped[0] if stopped else _in_one_line(problem)
        if last_try or stopped or error != DEAD_AT_START:
            break
    return keep_failed(source, partial, target, error)


def _in_one_line(problem: BaseException) -> str:
    if isinstance(problem, PapermillExecutionError):
        return f"{problem.ename}: {problem.evalue.strip()}".splitlines()[0]
    if "Kernel died before replying" in str(problem):
        return DEAD_AT_START
    if "Kernel died" in str(problem):
        return "the kernel died: it was killed, perhaps for want of memory"
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _literal(path: Path) -> str:
    """Keep papermill from filling in braces of a path."""
    return str(path).replace("{", "{{").replace("}", "}}")


def main() -> None:
    """Take a job as one line of JSON on stdin, and stop when stdin says why or is closed because the parent died."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell script, kernels too
    result_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the kernel prints is no result
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        job = json.loads(stdin.readline())
    stopped: list[str] = []

    def watch() -> None:
        stopped.append(os.read(0, 1000).decode().strip() or "interrupted")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # of the kernel: no progress bars in outputs; papermill has read it before
    result: dict[str, Any]
    try:
        with FileLock(str(lock_of(Path(job["target"]))), timeout=LOCK_SECONDS):
            result = execute(job, stopped)
    except Timeout:
        result = {"state": "failed", "cell": None, "error": "another process is executing this notebook: wait for it"}
    except KeyboardInterrupt:
        result = {"state": "failed", "cell": None, "error": stopped[0] if stopped else "interrupted"}
    print(json.dumps(result), file=result_stream, flush=True)


if __name__ == "__main__":
    main()
