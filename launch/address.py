"""Prints `ADDRESS INTERFACE IS_HOST`: what torchrun and gloo must know of this host to meet others at an endpoint.

    python launch/address.py HOST:PORT [LOCAL_ADDRESS]

ADDRESS is the one from which this host reaches the endpoint, INTERFACE has it. IS_HOST is 1 on the endpoint's host and
0 elsewhere; left out where the endpoint means loopback: torchrun gets that right, for two starts on one host too.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

import psutil

# Of no host (RFC 5737): the route there is the default route.
ELSEWHERE = ("192.0.2.1", 9)


def describe(endpoint: str, local_address: str | None = None) -> str:
    """Raises ValueError, with the fix, for an endpoint without a route and for an address that this host has not."""
    host, _, port = endpoint.rpartition(":")
    try:
        family, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        address = source_address(family, target)
        is_host = str(int(address == target[0]))
        if ipaddress.ip_address(address).is_loopback:
            address, is_host = local_address or source_address(socket.AF_INET, ELSEWHERE), ""
    except (OSError, ValueError) as error:
        raise ValueError(f"--rdzv-endpoint {endpoint}: {error}; give HOST:PORT of one of the hosts") from error
    address = local_address or address
    interfaces = [name for name, known in psutil.net_if_addrs().items() if address in [one.address for one in known]]
    if not interfaces:
        raise ValueError(f"--local-addr {address} is no address of this host; give one that `ip address` shows")
    return f"{address} {interfaces[0]} {is_host}"


def source_address(family: int, target: Any) -> str:
    """The address from which this host would send to `target`; nothing is sent. Raises OSError without a route."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


if __name__ == "__main__":
    try:
        print(describe(*sys.argv[1:]))
    except ValueError as problem:
        print(f"torchrun.sh: {problem}", file=sys.stderr)
        sys.exit(2)
