"""Which parts of Kimi K2 make a small language model better? See `nbs/` for the source."""

__version__ = "0.1.0"

# What is used first, without loading torch before it is asked for: `from kimi_nb import KimiModel, KimiConfig, Generator`.
_WHERE = {
    "KimiModel": "model", "KimiConfig": "config", "RunConfig": "config", "Generator": "generate", "Store": "store",
    "TextDataProcessor": "nanokimi", "TokenDataset": "data", "ArrayDataset": "nanokimi", "ModelEvaluator": "nanokimi", "NanoGPTComparison": "nanogpt",
}  # fmt: skip
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    found = getattr(import_module(f"{__name__}.{_WHERE[name]}"), "ModelConfig" if name == "KimiConfig" else name)
    globals()[name] = found
    return found


def __dir__(): return sorted([*globals(), *_WHERE])
