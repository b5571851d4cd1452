"""The error that is the user's to mend: one sentence, exit code 2."""


class UserError(ValueError):
    """A request that cannot be done as asked. The message names the thing, both values, and what to do."""
