"""`python -m nanodlm` is the command line."""

from nanodlm.cli.main import main

if __name__ == "__main__":
    main()
