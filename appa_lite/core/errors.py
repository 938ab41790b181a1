"""The exceptions for mistakes a user can make: the command line prints them as one line and exits with 2."""


class UserError(Exception):
    """What was expected, what was found, what to do; in one line."""


class DivergedError(UserError, FloatingPointError):
    """Numbers that ran away: a result where methods are compared, and the user's to know where there is one method."""
