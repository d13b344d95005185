"""Weights as safetensors, with what belongs to them as metadata. No pickle is read or written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, FlowError

if TYPE_CHECKING:
    import torch


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Writes whole or not at all."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    blob = save(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {k: json.dumps(v) for k, v in meta.items()}
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(blob)
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FlowError(Diagnostic("FL0801", f"`{path}` is no file", suggestion="check the path of the weights"))
    try:
        with safe_open(path, framework="pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            return {k: f.get_tensor(k) for k in f.keys()}, meta  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise FlowError(
            Diagnostic(
                "FL0803",
                f"`{path}` is not a readable safetensors file: {e}",
                suggestion="it may be damaged, or of another kind",
            )
        ) from None


def load_state(module: torch.nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Loads weights, or says how the spec differs from the one that they belong to."""
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    extra = sorted(set(tensors) - set(own))
    shapes = [f"`{k}` is {tuple(tensors[k].shape)} there and {tuple(own[k].shape)} here" for k in sorted(own)
              if k in tensors and own[k].shape != tensors[k].shape]  # fmt: skip
    if missing or extra or shapes:
        notes = []
        if missing:
            notes.append(
                f"the file lacks {', '.join(f'`{m}`' for m in missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            )
        if extra:
            notes.append(
                f"the file also has {', '.join(f'`{m}`' for m in extra[:5])}"
                + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            )
        notes.extend(shapes[:5])
        raise FlowError(
            Diagnostic("FL0803", f"the weights in `{name}` belong to another spec", notes=tuple(notes),
                       suggestion="use the spec and the sizes (`--set`) that they were trained with")
        )  # fmt: skip
    module.load_state_dict(tensors)


def save(module: torch.nn.Module, path: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Saves a compiled flow's weights."""
    write_tensors(Path(path), dict(module.state_dict()), {"flowlang": 1, **(meta or {})})


def load(module: torch.nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads weights into a compiled flow; returns the metadata that was saved with them."""
    tensors, meta = read_tensors(Path(path))
    load_state(module, tensors, str(path))
    return meta
