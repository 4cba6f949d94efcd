"""`python -m msd` is `msd`."""

from msd.cli import main

if __name__ == "__main__":
    main()
