"""FlowLang: write the forward map; the compiler proves it invertible and derives the rest."""

__version__ = "0.1.0"
