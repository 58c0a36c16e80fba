"""The exceptions that reach the command line, and others' words in them."""


def one_line(error: Exception, most: int = 300) -> str:
    """What an exception of a library says, in one line of at most `most` characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UserError(Exception):
    """A mistake the user can fix. The command line prints its sentence, without a traceback, and exits with 2.

    Sentences quote files that may hold anything: line ends and control characters are shown escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


class NotMetError(UserError):
    """The ranks did not find each other. Another try may succeed, so the command line exits with 75, EX_TEMPFAIL."""


class StoppedError(Exception):
    """A signal asked to stop, and what is finished is kept. Its text, if any, says where it was.

    The command line exits with 75, EX_TEMPFAIL; with 0 beside other ranks, whom their launcher would take for crashed.
    """
