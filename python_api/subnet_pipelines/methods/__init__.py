"""Methods by name: a new one is its file, a line here, a YAML and a test."""

from subnet_pipelines.methods.base import Clock, Method, MethodConfig, Phase, Prediction
from subnet_pipelines.methods.finetune import Finetune

METHODS: dict[str, type[Method]] = {m.name: m for m in (Finetune,)}

__all__ = ["METHODS", "Clock", "Method", "MethodConfig", "Phase", "Prediction"]
