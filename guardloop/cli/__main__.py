"""`python -m guardloop.cli`."""

from guardloop.cli.main import main

main()
