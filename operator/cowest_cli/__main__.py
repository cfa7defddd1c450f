"""`python -m cowest_cli` is `cowest`."""

from cowest_cli.main import main

main()
