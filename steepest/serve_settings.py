"""The settings of a service as flags, the environment and a file give them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import DirectoryPath, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from steepest.errors import SpecError, Violation
from steepest.telemetry_spec import Action, Rule

PREFIX = "STEEPEST_"


class ServeSettings(BaseSettings):
    """Names are those of the flags of `steepest serve`; in the environment STEEPEST_ stands before them."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    http_port: int = Field(default=8080, ge=0, le=65535)
    data_dir: Path = Path("steepest-data")
    database_url: str = ""
    ray_address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    retention_days: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    preemption: bool = False
    requirements: bool = True
    exchange_tls: bool | None = None
    calls_per_second: float = Field(default=500.0, ge=0.0, allow_inf_nan=False)
    secrets_dir: DirectoryPath | None = None
    health_actions: dict[Rule, Action] = {}

    def of_service(self) -> dict[str, Any]:
        """The same by the names of services.settings.Settings, but for the data directory."""
        return {
            "grpc_host": self.host,
            "grpc_port": self.port,
            "http_host": self.host,
            "http_port": self.http_port,
            "database": self.database_url,
            "ray_address": self.ray_address,
            "num_cpus": self.cpus,
            "tls_certificate": self.tls_cert,
            "tls_key": self.tls_key,
            "tls_client_ca": self.tls_client_ca,
            "retention_days": self.retention_days,
            "keeps_jobs": True,
            "preemption": self.preemption,
            "allows_requirements": self.requirements,
            "calls_per_second": self.calls_per_second,
            "exchange_tls": self.tls_cert is not None if self.exchange_tls is None else self.exchange_tls,
            "secrets_directory": self.secrets_dir,
            "health_actions": dict(self.health_actions),
        }


def read_settings(config: Path | None, given: dict[str, Any]) -> ServeSettings:
    """Flags, before the environment, before the file. given: by name, those of flags.

    Raises SpecError, which names each wrong setting and where it is from.
    """

    class WithFile(ServeSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

    try:
        if config is not None:
            config.open("rb").close()  # else a file that is not there would count as an empty one
        return WithFile(**given)
    except OSError as error:
        raise SpecError([Violation("--config", f"cannot read {config}: {error.strerror}")]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError([Violation("--config", f"{config} is no TOML: {error}")]) from None
    except SettingsError:  # the one setting that is no plain text
        problem = 'is no JSON object, such as {"diverging": "pause"}'
        raise SpecError([Violation(f"{PREFIX}HEALTH_ACTIONS", problem)]) from None
    except ValidationError as error:
        raise SpecError([_violation(dict(each), config, given) for each in error.errors()]) from None


def _violation(error: dict[str, Any], config: Path | None, given: dict[str, Any]) -> Violation:
    name, path = str(error["loc"][0]), ".".join(str(part) for part in error["loc"] if part != "[key]")
    if name in given:
        where = f"--{path}".replace("_", "-").replace("--health-actions", "--health-action")
    elif (variable := f"{PREFIX}{name.upper()}") in os.environ:
        where = variable
    else:
        where = f"{config}: {path}"
    if error["type"] == "extra_forbidden":
        return Violation(where, f"no setting of that name; there are: {', '.join(ServeSettings.model_fields)}")
    return Violation(where, f"{error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}")
