"""Addresses that look public and lead inside. Nothing is sent: addresses are only judged."""

from __future__ import annotations

import pytest

from lowmem.datasets.addresses import is_public

INSIDE = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "169.254.169.254",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fec0::1",
    "::1",
    "::",
    "ff02::1",
    "::ffff:10.0.0.1",
    "::ffff:168.63.129.16",
    "::169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::a00:1",
    "64:ff9b:1::808:808",
    "2002:a9fe:a9fe::1",
    "2002:7f00:1::1",
    "2001:0:a9fe:a9fe::",
    "192.88.99.1",
    "198.18.0.1",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
]
OUTSIDE = [
    "93.184.216.34",
    "8.8.8.8",
    "2606:4700:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
    "168.63.129.17",
]


@pytest.mark.parametrize("ip", INSIDE)
def test_addresses_that_lead_inside(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize("ip", OUTSIDE)
def test_addresses_on_the_public_network(ip: str) -> None:
    assert is_public(ip)
