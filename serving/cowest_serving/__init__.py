"""What answers a request: weak model server, gateway, traces. Imports nothing else of ours."""
