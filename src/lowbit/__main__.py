"""`python -m lowbit` is `lowbit`."""

from lowbit.cli import main

main()
