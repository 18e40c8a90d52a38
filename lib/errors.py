"""The one exception that is written for the person who gave the input."""


class UserError(ValueError):
    """Something given cannot work: one sentence with what was given, what is needed and what to change.

    The command line prints the sentence alone and exits with code 2.
    """
