"""`python -m stages`, the form that torchrun starts.

Python then looks for modules in the working directory first: a `random.py` that lies there would be run. So that folder
goes, unless this package lies in it.
"""

import os
import sys

if not os.path.samefile(sys.path[0] or os.curdir, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
    del sys.path[0]

from stages.cli import main

main()
