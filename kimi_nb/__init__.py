"""Which parts of Kimi K2 make a small language model better? See `nbs/` for the source."""

import sys
from importlib import import_module

__version__ = "0.1.0"


def lazily(
    package: str,  # name of the package whose face this is
    /,
    **homes: str,  # module of the package: the names it gives, separated by white space
):  # __getattr__, __dir__ and __all__ of the package
    "Public names of a package, each loaded from its module when it is first asked for (PEP 562)."
    home_of = {name: module for module, names in homes.items() for name in names.split()}

    def load(name):
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *home_of}), list(home_of)


# What is used first, without loading torch before it is asked for: `from kimi_nb import KimiModel, Generator`.
__getattr__, __dir__, __all__ = lazily(
    __name__,
    config="RunConfig KimiConfig",
    model="KimiModel",
    store="Store",
    data="TokenDataset",
    use="Generator TextDataProcessor ArrayDataset ModelEvaluator",
    bench="NanoGPTComparison",
)
_names = __dir__


def __dir__():
    return sorted([*_names(), "__version__"])
