"""`python -m striate` is the same program as `striate`."""

from striate.lib.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
