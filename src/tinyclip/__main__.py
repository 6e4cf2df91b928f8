"""`python -m tinyclip` is the `tinyclip` command."""

from tinyclip.cli import main

main()
