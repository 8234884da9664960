"""The one reader of configuration: ``flow_*`` keys of the Celery app, and the environment, which wins."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from celery_flows.store.engines import parse_url
from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import MAX_PAYLOAD_BYTES

ENV_PREFIX = "FLOW_"

LogFormat = Literal["console", "json"]


class FlowSettings(BaseSettings):
    """What can be set: as ``flow_NAME`` on the Celery app (``CELERY_FLOW_NAME`` under a namespace) or ``FLOW_NAME``
    in the environment. Durations are seconds."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    store_url: str | None = Field(
        None, description="The database: postgresql://user@host/name, or sqlite:///file.", repr=False
    )
    imports: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Modules with flow definitions that celery_flows.worker imports, separated by commas."
    )
    lease_seconds: float = Field(
        30.0, ge=1, le=3600, description="How long a worker may be silent before its work is taken over. Shorter "
        "recovers faster from a lost machine, and takes over from one that was only slow or stopped.",
    )  # fmt: skip
    sweep_seconds: float = Field(
        1.0, gt=0, le=3600, description="How often each worker looks for due work: how late a timer may fire."
    )
    sweep_limit: int = Field(
        500, ge=1, le=10_000, description="How many due rows one look takes at most, and how many messages a worker's "
        "looks may be ahead of what has been taken.",
    )  # fmt: skip
    republish_seconds: float = Field(
        5.0, gt=0, le=3600, description="How long a published message may stay unclaimed before it is sent again; "
        "doubled each time.",
    )  # fmt: skip
    republish_max_seconds: float = Field(300.0, gt=0, le=86_400, description="The longest such pause.")
    max_crashes: int = Field(
        5, ge=1, le=1000, description="How often in a row work may kill its worker before it is given up as lost."
    )
    publish_timeout_seconds: float = Field(
        1.0, gt=0, le=60, description="How long start() may wait for a broker that does not answer."
    )
    max_payload_bytes: int = Field(
        MAX_PAYLOAD_BYTES, ge=1, le=MAX_PAYLOAD_BYTES, description="The largest input, result or event, as JSON."
    )
    timer_horizon_days: float | None = Field(
        None, gt=0, le=36_500, description="Refuse timers further away than this; not set: any time in the future."
    )
    mirror: bool = Field(
        False, description="Workers record the tasks of canvases that flows.mirror() applied. A mirror_rule() turns it "
        "on too.",
    )  # fmt: skip
    mirror_silent_seconds: float = Field(
        86_400.0, ge=1, le=31_536_000, description="How long nothing may be seen of a mirrored flow's tasks before it "
        "is given up as lost; longer than your longest task, countdown or queue.",
    )  # fmt: skip
    retain_days: int = Field(
        30, ge=0, le=36_500, description="How long flows that finished or were cancelled are kept, by the daily prune."
    )
    retain_failed_days: int | None = Field(
        None, ge=0, le=36_500, description="How long flows that failed are kept; not set: three times as long."
    )

    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="Where each worker answers /metrics, /healthz and /readyz; not set: nowhere."
        " 0: at any port that is free, which its log names.",
    )  # fmt: skip
    metrics_address: str = Field(
        "127.0.0.1", min_length=1, description="The address of that port; 0.0.0.0: all of this machine's."
    )
    tracing: bool = Field(
        False, description="Make OpenTelemetry spans of flows and steps, in workers and where flows are started."
    )
    log_format: LogFormat = Field(
        "console", description="How celery_flows.worker, and an app told to by use_flow_logging(), writes its log: as "
        "lines to read (console) or as JSON (json).",
    )  # fmt: skip

    @field_validator("imports", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("store_url")
    @classmethod
    def _database(cls, value: str | None) -> str | None:
        if value is not None:
            parse_url(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return env_settings, init_settings

    def require_store_url(self) -> str:
        """The database's URL.

        Raises:
            InvalidData: none is set.
        """
        if self.store_url is None:
            raise InvalidData(
                "flow_store_url",
                "is not set; set FLOW_STORE_URL in the environment, or flow_store_url on the Celery app, "
                "to the database, e.g. postgresql://user@host/name",
            )
        return self.store_url


def load_settings(conf: Mapping[str, Any]) -> FlowSettings:
    """Reads and validates all settings at once.

    Raises:
        InvalidData: naming the setting, the rule it broke, and where it can be set. Never repeats a value.
    """
    given = {key.removeprefix("flow_"): conf[key] for key in _own_keys(conf)}
    for name in given:
        if name not in FlowSettings.model_fields:
            raise InvalidData(f"flow_{name}", f"is no setting{_meant(name, 'flow_', str.lower)}")
    for key in os.environ:
        name = key.removeprefix(ENV_PREFIX).lower()
        # Other software may have variables of its own that begin with FLOW_; only a near miss is surely meant for us.
        if key.startswith(ENV_PREFIX) and name not in FlowSettings.model_fields and _meant(name, ENV_PREFIX, str.upper):
            raise InvalidData(key, f"is no setting{_meant(name, ENV_PREFIX, str.upper)}")
    try:
        return FlowSettings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])
        raise InvalidData(
            f"flow_{name}", f"{first['msg']} (set as flow_{name} or in the environment as {ENV_PREFIX}{name.upper()})"
        ) from None


def _own_keys(conf: Mapping[str, Any]) -> set[str]:
    """Our keys of the configuration in their plain form; under a namespace Celery lists ``CELERY_FLOW_X``."""
    keys = list(conf)  # has Celery read its configuration; before, it does not know its namespace
    prefix = getattr(conf, "prefix", None) or ""
    plain = (key.removeprefix(prefix).lower() if prefix and key.startswith(prefix) else key for key in keys)
    return {key for key in plain if key.startswith("flow_")}


def _meant(name: str, prefix: str, case: Any) -> str:
    near = difflib.get_close_matches(name, FlowSettings.model_fields, n=1, cutoff=0.75)
    return f"; did you mean {prefix}{case(near[0])}?" if near else ""
