"""`accelerate launch` with one-line errors.

After every preemption torchrun's agent raises an exception, and Python would print its traceback below the trainer's
last line. `accelerate launch --quiet` does not reach this exception.
"""

import sys

from accelerate.commands.launch import main

sys.tracebacklimit = 0
main()
