"""Approvals: what a flow asks of a person, and what the person said."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from celery_flows.store.validation import MAX_NAME_CHARS, check_name

TOPIC = "approval"
MAX_CHARS = MAX_NAME_CHARS - len(f"{TOPIC} ")  # of a name, which is a part of the topic


class Approval(BaseModel):
    """What somebody decided: ``granted`` or not, by whom, when (UTC, the database's clock), and in what words."""

    model_config = ConfigDict(frozen=True)

    granted: bool
    by: str
    at: datetime
    comment: str = ""


def approval_key(flow_id: UUID, name: str) -> tuple[str, str]:
    """Topic and correlation id of the external event that an approval is.

    Raises:
        InvalidData: the name is empty or too long.
    """
    return f"{TOPIC} {check_approval(name)}", str(flow_id)


def check_approval(name: str) -> str:
    """``name``, if an approval can have it.

    Raises:
        InvalidData: it is empty or too long.
    """
    return check_name("approval", name, limit=MAX_CHARS)
