"""`python -m stages`, the form that torchrun starts.

Removes the working directory from sys.path unless it contains this package, so that a local `random.py` does not
shadow the standard library's.
"""

import os
import sys

if not os.path.samefile(sys.path[0] or os.curdir, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
    del sys.path[0]

from stages.cli import main

main()
