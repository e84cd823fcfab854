"""How options are written in errors: for Python, or for the command line."""

from __future__ import annotations

import pytest

from ditforge.errors import UserError
from ditforge.option import as_flags, option


@pytest.mark.parametrize(
    ("made", "python", "flag"),
    [
        (option("true_cfg=4"), "true_cfg=4", "--true-cfg 4"),
        (option("true_cfg"), "true_cfg", "--true-cfg"),
        (option('tls=TLS(ca="FILE")', "--tls-ca FILE"), 'tls=TLS(ca="FILE")', "--tls-ca FILE"),
    ],
)
def test_an_option_reads_as_whoever_reads_it_writes_it(made: str, python: str, flag: str) -> None:
    """Also one that was made before it was known who that is."""
    assert (str(made), f"{made}; or", made + "!", UserError("no", made).fix) == (
        python,
        f"{python}; or",
        f"{python}!",
        python,
    )
    with as_flags():
        assert (str(made), f"{made}; or", made + "!", UserError("no", made).fix) == (
            flag,
            f"{flag}; or",
            f"{flag}!",
            flag,
        )
        error = UserError(f"{made} is wrong", f"leave {made} out")
    assert str(error) == f"{flag} is wrong\nfix:   leave {flag} out"
    assert str(made) == python
