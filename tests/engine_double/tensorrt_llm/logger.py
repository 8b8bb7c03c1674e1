"""Imitates `logger.py`: one logger for the engine, here Python's own so that tests can read it."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("tensorrt_llm")
