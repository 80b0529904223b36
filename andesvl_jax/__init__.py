"""AndesVL in JAX: load, question, probe and save AndesVL models (arXiv 2510.11496)."""

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.decoding.api import chat, generate
from andesvl_jax.decoding.probe import probe
from andesvl_jax.decoding.session import Session
from andesvl_jax.errors import UserError

__all__ = ["Bundle", "Session", "UserError", "chat", "generate", "load", "probe", "save"]
