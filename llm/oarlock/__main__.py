"""`python -m oarlock` is the `oarlock` command."""

from oarlock.cli import main

if __name__ == "__main__":
    main()
