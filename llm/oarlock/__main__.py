"""`python -m oarlock` is the `oarlock` command."""

from oarlock.cli.main import main

if __name__ == "__main__":
    main()
