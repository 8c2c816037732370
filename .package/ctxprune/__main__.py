"""`python -m ctxprune` is the command `ctxprune`."""

from ctxprune.cli.main import main

if __name__ == "__main__":
    main()
