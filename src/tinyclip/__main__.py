"""`python -m tinyclip`, and the `tinyclip` command. It answers a stop from the start: before torch is imported."""

import sys
import warnings

from tinyclip.stopping import answered


def main() -> None:
    # Those of dependencies: none fails a run, whatever python -W or PYTHONWARNINGS says.
    warnings.simplefilter("default" if "--debug" in sys.argv else "ignore")
    with answered():
        from tinyclip import cli

        cli.main()


if __name__ == "__main__":
    main()
