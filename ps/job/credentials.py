"""What the processes of a job on several hosts know each other by, when they speak TLS.

Both ends show the one certificate that the job has, so nobody is let in who has not been given its key.
"""

from __future__ import annotations

import datetime
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

NAME = "steepest-job"  # in the certificate, for clients that check one
VALID_DAYS = 3650


@dataclass(frozen=True)
class Credentials:
    """A certificate that is its own authority, and its key, both PEM."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)

    @staticmethod
    def create() -> Credentials:
        """New ones, for one life of a job."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))  # clocks of hosts differ
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Credentials(made.public_bytes(serialization.Encoding.PEM), private)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """For one end."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.certificate.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # no session is taken up again
        # The module reads keys from files only; this one is in memory, and nobody else can open it.
        descriptor = os.memfd_create("steepest-credentials")
        try:
            os.write(descriptor, self.key + self.certificate)
            context.load_cert_chain(Path(f"/proc/self/fd/{descriptor}"))
        finally:
            os.close(descriptor)
        return context
