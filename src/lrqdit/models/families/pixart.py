"""PixArt-alpha and PixArt-Sigma."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {"PixArtTransformer2DModel": ModelSpec(rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})")}
