"""Weights as safetensors, with what belongs to them as metadata. No pickle is read or written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.files import replace_file

if TYPE_CHECKING:
    import torch

SHOWN = 5  # names listed in one message


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    blob = save(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {k: json.dumps(v) for k, v in meta.items()}
    )
    replace_file(Path(path), blob)


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file and its metadata; FL0801 or FL0803 for a file that cannot be used."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FlowError(Diagnostic("FL0801", f"`{path}` is no file", suggestion="check the path of the weights"))
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            return {k: f.get_tensor(k) for k in f.keys()}, meta  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise FlowError(
            Diagnostic("FL0803", f"`{path}` is not a readable safetensors file: {e}", suggestion="it may be damaged, or of another kind")
        ) from None  # fmt: skip


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{n}`" for n in names[:SHOWN]) + more


def load_state(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Loads weights, or says how the spec differs from the one that they belong to (FL0803)."""
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    extra = sorted(set(tensors) - set(own))
    notes = [f"the file lacks {listed(missing)}"] if missing else []
    if extra:
        notes.append(f"the file also has {listed(extra)}")
    shapes = [f"`{k}` is {tuple(tensors[k].shape)} in the file and {tuple(own[k].shape)} in the spec" for k in sorted(own)
              if k in tensors and own[k].shape != tensors[k].shape]  # fmt: skip
    notes += shapes[:SHOWN]
    if len(shapes) > SHOWN:
        notes.append(f"{len(shapes) - SHOWN} more differ in shape")
    kinds = [k for k in sorted(own) if k in tensors and own[k].is_floating_point() != tensors[k].is_floating_point()]
    if kinds:
        notes.append(f"whole numbers and reals are exchanged in {listed(kinds)}")
    if notes:
        raise FlowError(
            Diagnostic("FL0803", f"the weights in `{name}` belong to another spec", notes=tuple(notes),
                       suggestion="use the spec and the sizes (`--set`) that they were trained with")
        )  # fmt: skip
    module.load_state_dict(dict(tensors))


def load_alike(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """Loads the weights whose names and shapes are the module's own; gives the names of those that keep their start."""
    own = module.state_dict()
    alike = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    if not alike:
        raise FlowError(
            Diagnostic("FL0803", f"no weight of `{name}` has the name and the shape of one in the spec",
                       notes=(f"the file has {listed(sorted(tensors))}", f"the spec has {listed(sorted(own))}"),
                       suggestion="a network is found by its name in the model: give it the same in both specs")
        )  # fmt: skip
    module.load_state_dict(alike, strict=False)
    return sorted(set(own) - set(alike))
