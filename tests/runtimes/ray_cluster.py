"""Runs in an environment with Ray: a cluster on this machine, driven by lines on standard input.

python ray_cluster.py NODE...    NODE: arguments of a node as JSON, the head first

It answers with one line of JSON: first the address, then, to `jobs` and to `kill N`, the commands
of the jobs that run on each node. `kill` ends a node as a power cut does: nothing on it is told.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil
from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def processes(node: Any) -> list[psutil.Process]:
    """All of a node, parents before their children."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def jobs(node: Any) -> list[str]:
    """Command lines of the conversions on a node."""
    commands = []
    for process in processes(node):
        with suppress(psutil.NoSuchProcess):
            commands.append(" ".join(process.cmdline()))
    return [command for command in commands if " rilq convert " in command]


def main() -> None:
    """Start the nodes; obey until the input ends."""
    head, *others = ({**SMALL, **json.loads(text)} for text in sys.argv[1:])
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.head_node, *(cluster.add_node(**node) for node in others)]
    print(json.dumps(cluster.address), flush=True)
    for line in sys.stdin:
        command, *number = line.split()
        if command == "kill":
            node = nodes.pop(int(number[0]))
            for process in processes(node):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)
        print(json.dumps([jobs(node) for node in nodes]), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
