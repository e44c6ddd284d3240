"""Certificates of an authority of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import trustme


class Certificates(NamedTuple):
    """PEM files. authority: what a client needs; certificate, key: what a service needs."""

    authority: Path
    certificate: Path
    key: Path


def certificates(directory: Path) -> Certificates:
    """For a service on loopback; own-cert.pem and own-key.pem are for a caller."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    made = Certificates(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    authority.cert_pem.write_to_path(made.authority)
    own = authority.issue_cert("person@example.org")
    own.cert_chain_pems[0].write_to_path(directory / "own-cert.pem")
    own.private_key_pem.write_to_path(directory / "own-key.pem")
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    issued.private_key_pem.write_to_path(made.key)
    return made
