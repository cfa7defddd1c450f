"""Starts LiteLLM proxies for `torture_gateway`, in LiteLLM's own environment. Imports nothing of ours.

Imports take LiteLLM ten seconds or more, so each proxy is forked from this process, which has done them: a port on
standard input is answered by the process id of a proxy that will listen there. It is killed by who asked for it.
"""

import os
import signal
import sys

import uvicorn
from litellm.proxy.proxy_server import app


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    print("ready", flush=True)
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        uvicorn.run(app, host="127.0.0.1", port=int(line), log_level="error", access_log=False)
        os._exit(0)


if __name__ == "__main__":
    main()
