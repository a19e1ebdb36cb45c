"""Which parts of Kimi K2 make a small language model better? See `nbs/` for the source."""

__version__ = "0.1.0"
