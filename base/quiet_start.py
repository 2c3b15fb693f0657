"""Ctrl-C while a program imports its modules: it ends without a traceback, with exit code 130.

A program imports this module first. `training/exit_codes.py` handles later signals.
"""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
