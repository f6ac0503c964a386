"""The command: Ctrl-C ends it with a word, also while Python is still importing."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of `olmfast` and `python -m olmfast`."""
    try:
        from olmfast.cli import main

        main()
    except KeyboardInterrupt as error:
        print("olmfast: stopped", file=sys.stderr)
        raise SystemExit(130) from error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python cleans up, there is nothing to interrupt


if __name__ == "__main__":
    main()
