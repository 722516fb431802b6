"""`python -m weightfs` is `weightfs`."""

from weightfs.cli import main

if __name__ == "__main__":
    main()
