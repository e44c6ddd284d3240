"""The interceptor that lets in who may do what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from services.api.errors import rewrapped
from services.jobs.access import NEEDS, Access, Caller, Need, answering

PREFIX = "trainingJobs/"


class AccessInterceptor(grpc.ServerInterceptor):
    """Stands before the servicer. Health and reflection are open: they tell nothing of jobs."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Wrap the handler, whichever kind it is."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/steepest."):
            return handler
        need = NEEDS[handler_call_details.method.rpartition("/")[2]]

        def single(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                with answering(self._admit(need, request, context)):
                    return behaviour(request, context)

            return call

        def stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                self._admit(need, request, context)
                yield from behaviour(request, context)

            return call

        return rewrapped(handler, single, stream)

    def _admit(self, need: Need, request: Any, context: grpc.ServicerContext) -> Caller:
        said = dict(context.invocation_metadata()).get("authorization", "")
        caller = self._access.caller(said if isinstance(said, str) else "")
        self._access.check(caller, need, request.name.removeprefix(PREFIX) if need is Need.OWN else "")
        return caller
