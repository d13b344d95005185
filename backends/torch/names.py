"""Python names for the spec's names: ASCII, unique, never a keyword."""

from __future__ import annotations

import builtins
import keyword
import re
import unicodedata

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "eps", "ζ": "zeta", "η": "eta", "θ": "theta", "ι": "iota",
    "κ": "kappa", "λ": "lam", "μ": "mu", "ν": "nu", "ξ": "xi", "ο": "omicron", "π": "pi", "ρ": "rho", "σ": "sigma", "ς": "sigma",
    "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
}  # fmt: skip
RESERVED = {
    "self", "torch", "math", "F", "nn", "Tensor", "generator", "batch", "training", "forward", "inverse", "score", "generate",
    "Any", "Sequence", "Callable", "parameters", "modules", "children", "buffers", "type", "half", "float", "double", "to",
    "train", "eval", "apply", "cpu", "cuda", "compile", "zero_grad", "state_dict", "register_buffer", "share_memory", "T_destination",
    "value", "inverse_value", "score_value", "generate_value", "like", "types", "log_prob", "sample", "rsample",
    "sample_and_log_prob", "to_distribution", "data_shape", "base_shape", "data_domain", "emitted_shapes", "given_shapes",
    "initialise", "initialised", "exactness", "log_prob_bound",
}  # fmt: skip


def ascii_name(name: str) -> str:
    """A spelling in ASCII letters, digits and `_`."""
    out = []
    for c in unicodedata.normalize("NFKC", name):
        low = c.lower()
        if low in GREEK:
            out.append(GREEK[low].capitalize() if c != low else GREEK[low])
        elif c == "'":
            out.append("_prime")
        elif c.isascii() and (c.isalnum() or c == "_"):
            out.append(c)
        else:
            out.append("_")
    found = re.sub(r"_+", "_", "".join(out)).strip("_") or "v"
    return f"v{found}" if found[0].isdigit() else found


class Names:
    """Names of one scope."""

    def __init__(self, taken: set[str] | None = None):
        self.taken = set(taken or ()) | RESERVED

    def fresh(self, wanted: str) -> str:
        base = ascii_name(wanted)
        if keyword.iskeyword(base) or keyword.issoftkeyword(base) or hasattr(builtins, base):
            base += "_"
        name, n = base, 1
        while name in self.taken:
            n += 1
            name = f"{base}_{n}" if not base.endswith("_") else f"{base}{n}"
        self.taken.add(name)
        return name


def class_name(name: str) -> str:
    return "".join(p[:1].upper() + p[1:] for p in ascii_name(name).split("_") if p) or "Part"
