"""`python -m fastigpt.cli`."""

from fastigpt.cli import main

if __name__ == "__main__":
    main()
