"""Where servers listen, and the options of the sockets between processes."""

from __future__ import annotations

from dataclasses import dataclass

from ps.memory.segment import SegmentReference

GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)
CHUNK_BYTES = 4 << 20
REPORT_SECONDS = 0.25  # between reports of steps, unless the controller wants fewer; all else is told at once


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens. control: host:port of its gRPC port, for the controller.

    network: host:port for workers and other servers; local: the same as a Unix socket on its own host.
    host: which that is (ps.memory.host); parameters: memory for the whole layout, for processes there.
    """

    control: str
    network: str
    local: str
    host: str
    parameters: SegmentReference
