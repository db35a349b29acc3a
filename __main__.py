"""`python -m rilq`: the same as the `rilq` command."""

from rilq.cli import main

if __name__ == "__main__":
    main()
