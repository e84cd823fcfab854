"""The command `ditforge`, also as `python -m ditforge`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, even while it is being imported."""
    try:
        from ditforge import interrupt
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        interrupt.heed()
        from ditforge import cli

        cli.main()
    except KeyboardInterrupt:
        interrupt.end()
    finally:
        interrupt.command_ended()


if __name__ == "__main__":
    main()
