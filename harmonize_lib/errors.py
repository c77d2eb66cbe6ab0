"""The one error a user's mistake raises: one line, what is wrong, what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import accumulate

LONGEST = 200 - len("harmonize: ")  # of a line, so that it is no longer than 200 on a terminal, either


class HarmonizeError(ValueError):
    """A user's mistake, told in one line: what is wrong and what would be right."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line alone."""
        return [f"{type(self).__name__}: {self}"]


def one_line(error: BaseException, longest: int) -> str:
    """What somebody else's exception says, cut to one short line.

    Parameters
    ----------
    error : BaseException
        Any.
    longest : int
        Characters at most.

    Returns
    -------
    str
        Its kind and its message.
    """
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def unknown(kind: str, name: object, options: Iterable[str], listed: str = "") -> HarmonizeError:
    """Error for a name that is not among the options.

    Parameters
    ----------
    kind : str
        What the name should have been, e.g. ``"method"``.
    name : object
        The name that was given.
    options : Iterable[str]
        The names that would be right.
    listed : str
        What tells them all, e.g. ``"list_models()"``, for names that do not fit into the line.

    Returns
    -------
    HarmonizeError
        One line that suggests the nearest option, or lists them all, or as many as fit.
    """
    options = sorted(options)
    near = get_close_matches(str(name), options, n=1)
    line = f"unknown {kind} {str(name)[:60]!r}"
    if near:
        return HarmonizeError(f"{line}: did you mean {near[0]!r}?")
    whole = f"{line}: choose from {', '.join(options) or 'nothing: there is none'}"
    if len(whole) <= LONGEST:
        return HarmonizeError(whole)
    start, end = f"{line}: choose from ", f"... ({f'{listed} lists all' if listed else 'in all'} {len(options)})"
    room = LONGEST - len(start) - len(end)
    shown = [o for o, used in zip(options, accumulate(len(o) + 2 for o in options), strict=True) if used <= room]
    return HarmonizeError(f"{start}{', '.join([*shown, end])}")
