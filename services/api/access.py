"""The interceptor that lets in who may do what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc

from services.api.errors import rewrapped
from services.jobs.access import NEEDS, Access, Caller, Need, answering
from services.jobs.audit import Call

PREFIX = "trainingJobs/"


def _each(caller: Caller, answers: Iterator[Any]) -> Iterator[Any]:
    """The answers, for each of which the caller is known while it is made."""
    while True:
        with answering(caller):
            try:
                answer = next(answers)
            except StopIteration:
                return
        yield answer


class AccessInterceptor(grpc.ServerInterceptor):
    """Stands before the servicer. Health and reflection are open: they tell nothing of jobs."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Wrap the handler, whichever kind it is."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/steepest."):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        need = NEEDS[method]

        def noted(request: Any, context: grpc.ServicerContext) -> AbstractContextManager[Call]:
            call = Call(method, context.peer(), getattr(request, "name", ""))
            return self._access.audit.of(call, changes=need is not Need.LOOK)

        def single(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            def answer_one(request: Any, context: grpc.ServicerContext) -> Any:
                with noted(request, context) as call, answering(self._admit(need, request, context, call)):
                    answer = behaviour(request, context)
                    call.target = call.target or getattr(answer, "name", "")
                    return answer

            return answer_one

        def stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            def answer_many(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with noted(request, context) as call:
                    caller = self._admit(need, request, context, call)
                    with contextlib.closing(behaviour(request, context)) as answers:
                        yield from _each(caller, answers)

            return answer_many

        return rewrapped(handler, single, stream)

    def _admit(self, need: Need, request: Any, context: grpc.ServicerContext, call: Call) -> Caller:
        said = dict(context.invocation_metadata()).get("authorization", "")
        caller = self._access.caller(said if isinstance(said, str) else "", context.peer())
        call.caller = caller.name
        self._access.check(caller, need, request.name.removeprefix(PREFIX) if need is Need.OWN else "")
        return caller
