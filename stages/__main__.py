"""`python -m stages`, the form that torchrun starts."""

from stages.cli import main

main()
