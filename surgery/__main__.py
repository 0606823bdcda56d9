"""`python -m surgery` is `surgery`."""

from surgery.cli.main import program

program()
