"""What all sections of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every configuration section: frozen, without unknown keys, without inf or nan."""

    # validate_default: the defaults are held to the same bounds as what a user writes.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
