"""The one exception that means "the user can mend this": no traceback on the command line."""


class UserError(ValueError):
    """Bad input, told in one message: which argument, which value, what to do instead."""
