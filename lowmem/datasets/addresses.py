"""Which IP addresses are on the public network.

`ipaddress` knows IANA's registries of special addresses. It does not look into IPv6 addresses that stand for IPv4 ones, and
two clouds serve their machines' credentials at addresses that count as public.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # IETF protocol assignments, RFC 6890; 192.0.0.192 is Oracle's metadata service
            "168.63.129.16/32",  # Azure's platform services
        ),
    )
)
_NOT_ROUTED = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.88.99.0/24",  # 6to4 relays, deprecated by RFC 7526
            "64:ff9b:1::/48",  # NAT64 of a network's own, RFC 8215
            "fec0::/10",  # site-local, deprecated by RFC 3879
            "3fff::/20",  # documentation, RFC 9637
            "5f00::/16",  # segment routing, RFC 9602
        ),
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, deprecated: likewise


def is_public(ip: str) -> bool:
    """Whether a packet to `ip` leaves for the public network, whatever IPv4 address an IPv6 address stands for."""
    return all(map(_is_public, _meant(ipaddress.ip_address(ip))))


def _is_public(address: Address) -> bool:
    special = any(address in network for network in (*_METADATA, *_NOT_ROUTED) if network.version == address.version)
    return address.is_global and not address.is_multicast and not special


def _meant(address: Address) -> Iterator[Address]:
    """The IPv4 addresses that `address` stands for, and itself unless it is only another way to write one."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
    elif address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    elif address in _NAT64 or address in _COMPATIBLE:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    else:
        yield address
        if address.sixtofour is not None:
            yield address.sixtofour
        yield from address.teredo or ()
