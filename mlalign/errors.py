"""The exceptions that reach the command line."""


class UserError(Exception):
    """A mistake the user can mend. The command line prints its sentence, without a traceback, and exits with 2."""


class NotMetError(UserError):
    """The ranks did not find each other. Another try may succeed, so the command line exits with 75, EX_TEMPFAIL."""


class StoppedError(Exception):
    """A signal asked to stop, and what is finished is kept. The command line exits with 0."""
