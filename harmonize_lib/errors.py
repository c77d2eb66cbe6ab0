"""The one error a user's mistake raises: one line, what is wrong, what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HarmonizeError(ValueError):
    """A user's mistake, told in one line: what is wrong and what would be right."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line alone."""
        return [f"{type(self).__name__}: {self}"]


def unknown(kind: str, name: object, options: Iterable[str]) -> HarmonizeError:
    """Error for a name that is not among the options.

    Parameters
    ----------
    kind : str
        What the name should have been, e.g. ``"method"``.
    name : object
        The name that was given.
    options : Iterable[str]
        The names that would be right.

    Returns
    -------
    HarmonizeError
        One line that suggests the nearest option, or lists them all.
    """
    options = sorted(options)
    near = get_close_matches(str(name), options, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(options) or 'nothing: there is none'}"
    line = f"unknown {kind} {str(name)[:60]!r}: {hint}"
    return HarmonizeError(line if len(line) <= 200 else line[:197] + "...")
