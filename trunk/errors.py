"""The errors that a user sees. Each says what was wrong, where, and what to do about it."""


class DitforgeError(Exception):
    """Something failed in ditforge or on a server. The command line then exits with code 1.

    `problem` says what was wrong, with the value that was seen and the values that are allowed. `fix` says what to do.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = str(problem)
        self.fix = str(fix)  # an Option is written now, as a flag or in Python's form

    def __str__(self) -> str:
        return f"{self.problem}\nfix:   {self.fix}" if self.fix else self.problem


class UserError(DitforgeError):
    """The input was wrong: an option, a file, a folder or an address. The command line then exits with code 2."""

    exit_code = 2


class DitforgeWarning(UserWarning):
    """A warning that the user should see once. The work goes on."""
