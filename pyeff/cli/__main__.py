"""`python -m pyeff.cli`: the `pyeff` command of this interpreter."""

from pyeff.cli import main

main()
