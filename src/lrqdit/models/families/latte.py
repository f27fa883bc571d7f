"""Latte: spatial and temporal blocks by turns."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {"LatteTransformer3DModel": ModelSpec(rf"(temporal_)?transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})")}
