"""The command line and the embedded engine."""
