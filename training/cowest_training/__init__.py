"""The steps of a round, each also a command."""
