"""The gRPC port: the job service, with health and reflection beside it."""

from __future__ import annotations

from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.api.access import AccessInterceptor
from services.api.errors import ErrorInterceptor
from services.api.servicer import TrainingJobServicer
from services.api.watches import MAX_STREAMS
from services.jobs.access import Access
from services.settings import Settings
from services.telemetry.calls import CallMetrics
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

MAX_CALLS = 256 + MAX_STREAMS
MAX_REQUEST_BYTES = 16 << 20
STOP_SECONDS = 1.0


class GrpcServer:
    """Holds the port from construction on, and serves from `start` to `stop`. Raises OSError when the port is taken."""

    def __init__(self, settings: Settings, access: Access, metrics: CallMetrics) -> None:
        self._server = grpc.server(
            futures.ThreadPoolExecutor(MAX_CALLS),
            interceptors=[ErrorInterceptor(metrics), AccessInterceptor(access)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_REQUEST_BYTES)],
        )
        address = f"{settings.grpc_host}:{settings.grpc_port}"
        try:
            if settings.tls_certificate is None or settings.tls_key is None:
                self.port = self._server.add_insecure_port(address)
            else:
                pair = settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes()
                authority = None if settings.tls_client_ca is None else settings.tls_client_ca.read_bytes()
                credentials = grpc.ssl_server_credentials([pair], authority, require_client_auth=bool(authority))
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: address already in use; choose another port") from error

    def start(self, servicer: TrainingJobServicer) -> None:
        """Begin to answer."""
        pb_grpc.add_TrainingJobServiceServicer_to_server(servicer, self._server)
        checker = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, self._server)
        name = pb.DESCRIPTOR.services_by_name["TrainingJobService"].full_name
        for each in ("", name):
            checker.set(each, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._server.start()

    def stop(self) -> None:
        """Answer no more; calls in progress have a moment to end."""
        self._server.stop(grace=STOP_SECONDS).wait()
