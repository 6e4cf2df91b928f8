"""`python -m tinyclip`, and the `tinyclip` command. It answers a stop from the start: before torch is imported."""

from tinyclip.stopping import answered


def main() -> None:
    with answered():
        from tinyclip import cli

        cli.main()


if __name__ == "__main__":
    main()
