"""The error that is the user's to mend: one sentence, exit code 2."""


class UserError(ValueError):
    """Something that was asked for cannot be done as asked. The message says what, both values, and what to do."""
