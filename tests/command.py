"""The program `surgery`, called in this process."""

from click.testing import CliRunner, Result

from surgery.cli.main import main


def run(*words: object, status: int | None = None, stdin: str | bytes = "", **environment: str) -> Result:
    """What the program says to a command line, without colours. `status`: the one that it must end with."""
    result = CliRunner(env={"NO_COLOR": "1", **environment}).invoke(main, [*map(str, words)], input=stdin)
    assert status in (None, result.exit_code), result.output
    return result
