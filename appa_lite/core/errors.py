"""The one exception for mistakes a user can make: the command line prints it as one line and exits with 2."""


class UserError(Exception):
    """What was expected, what was found, what to do; in one line."""
