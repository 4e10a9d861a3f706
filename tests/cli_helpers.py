"""What the tests of the command line share."""

from datencoder_jax.cli import main


def fails(capsys, match, *argv):
    """The command ends with status 2 and one sentence that contains `match`."""
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and match in lines[0], lines
    return lines[0]
