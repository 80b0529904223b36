"""One process of a run, for test_hosts.py: `andesvl train` that meets with something just before its n-th step.

Usage: one_process.py EVENT@N ARGUMENTS..., where EVENT is SIGKILL, SIGTERM, error (what a user can mend) or none.
"""

import os
import signal
import sys

from andesvl_jax.cli import main
from andesvl_jax.errors import UserError
from andesvl_jax.training import loop as loop_lib

event, _, number = sys.argv[1].partition("@")
real, calls = loop_lib.train_step, 0


def step(*args):
    global calls
    calls += 1
    if event != "none" and calls == int(number):
        if event == "error":
            raise UserError("data: found nonsense, expected sense.")
        os.kill(os.getpid(), getattr(signal, event))
    return real(*args)


loop_lib.train_step = step
sys.exit(main(sys.argv[2:]))
