"""The one exception that users see: a single sentence that says what is wrong and what to do."""


class UserError(Exception):
    """A mistake the user can mend. The command line prints its sentence, without a traceback, and exits with 2."""
