"""What a user can mend."""


class UserError(Exception):
    """A user's mistake. The command line prints its one sentence and ends with exit code 1."""
