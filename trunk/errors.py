"""The errors a user sees: what was wrong, where, and what to do about it."""


class DitforgeError(Exception):
    """Something failed on our side or on a server's; the command line exits with code 1.

    `problem` says what was wrong with the value seen and the values allowed, `fix` what to do.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = str(problem)
        self.fix = str(fix)  # of an Option, what it is called here and now

    def __str__(self) -> str:
        return f"{self.problem}\nfix:   {self.fix}" if self.fix else self.problem


class UserError(DitforgeError):
    """The input was wrong (an option, a file, a folder, an address); exit code 2."""

    exit_code = 2


class DitforgeWarning(UserWarning):
    """Something that the user should know, said once; the work goes on."""
