"""`python -m flowlang`: the command line, where its script is not on the path."""

from flowlang.cli.main import main

if __name__ == "__main__":
    main()
