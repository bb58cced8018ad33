"""`python -m latentkit` is the command `latentkit`."""

from latentkit.cli import main

main()
