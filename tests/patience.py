"""How long a test waits for what comes by itself."""

IN_TIME = 60.0  # seconds for what takes some turns of a loop: a machine with much to do may not run it for ten
