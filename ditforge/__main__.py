"""`python -m ditforge` is `ditforge`."""

from ditforge.cli import main

main()
