"""The part of the job spec about where a job runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from steepest.spec_base import NonNegativeInt, PositiveFloat, SpecModel

DEFAULT_MAX_WORKERS = 2


class PlacementSpec(SpecModel):
    """Where a job runs. Never changes the result, but for threads_per_worker and the type of the devices."""

    workers: Annotated[int, Field(ge=1, le=1024)] = Field(default=1, description="Number of workers.")
    min_workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Elastic: begin with as few if there is no room for more, grow when there is, and give workers up, "
        "down to so many, when others wait.",
        json_schema_extra={"default_text": "the number of workers"},
    )
    max_workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="The most workers that a step is cut for; fewer and larger micro-batches take less time in all.",
        json_schema_extra={"default_text": str(DEFAULT_MAX_WORKERS)},
    )
    servers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        default=None,
        description="Number of servers, or auto: one; on several hosts one each, from 16 MiB of parameters on.",
        json_schema_extra={"default_text": "auto"},
    )
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="CPU threads of each worker; another number may change the last bits."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device of the workers: cpu or cuda, a GPU each.")
    server_device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Device of the servers: cpu or cuda, each on the GPU of a worker."
    )
    transport: Literal["auto", "inline"] = Field(
        default="auto", description="auto: shared memory within a host; inline: the network everywhere."
    )
    worker_timeout_seconds: PositiveFloat = Field(
        default=300.0, description="A worker that does not answer for so long is replaced."
    )
    max_worker_restarts: NonNegativeInt = Field(
        default=3, description="Deaths in a row, without a step in between, that the job survives."
    )

    @field_validator("servers", mode="before")
    @classmethod
    def _automatic(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _min_workers_are_no_more(self) -> Self:
        least = self.num_servers if self.server_device == "cuda" else 1
        if self.min_workers is not None and not least <= self.min_workers <= self.workers:
            whose = ", one for each server on a GPU," if least > 1 else ""
            raise ValueError(f"min_workers = {self.min_workers}; allowed: {least}{whose} to workers = {self.workers}")
        return self

    @model_validator(mode="after")
    def _servers_have_gpus(self) -> Self:
        if self.server_device == "cuda" and self.device != "cuda":
            raise ValueError(
                f"server_device = 'cuda' needs device = 'cuda', not {self.device!r}: servers are on GPUs of workers"
            )
        if self.server_device == "cuda" and self.num_servers > self.workers:
            raise ValueError(
                f"servers = {self.servers} with server_device = 'cuda'; allowed: 1 to {self.workers}, the number of "
                "workers, whose GPUs they are on"
            )
        return self

    @property
    def num_servers(self) -> int:
        """How many servers there are; 1 until the service has chosen."""
        return self.servers or 1
