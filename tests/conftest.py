"""Tests are the same wherever they are started: Ctrl-C reaches what they start, figures are those of this folder."""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
os.environ.pop("HARMONIZE_FIGURES", None)
