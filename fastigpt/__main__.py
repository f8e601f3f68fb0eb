"""`python -m fastigpt` is the command `fastigpt`."""

from fastigpt.cli import main

if __name__ == "__main__":
    main()
