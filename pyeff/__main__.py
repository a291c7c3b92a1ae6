"""`python -m pyeff`: the `pyeff` command of this interpreter."""

from pyeff.cli import main

if __name__ == "__main__":
    main()
