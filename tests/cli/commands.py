"""Commands, as a test runs them in its own process."""

from ragkv.cli import main


def run(capsys, *argv):
    """Exit code, stdout and stderr."""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err
