"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flowlang.diagnostics import Diagnostic, FlowError


def replace_file(path: Path, blob: bytes | Iterable[bytes]) -> None:
    """A reader, a crash or a full disk never leaves half a file, nor costs the one that was there.

    Links stay links and modes what they were; pipes and devices are written as they are. Raises FlowError (FL0801).
    """
    parts = [blob] if isinstance(blob, bytes) else blob
    try:
        if not path.name or path.is_dir():
            raise FlowError(
                Diagnostic(
                    "FL0801", f"`{path}` is a folder, and a file is to be written", suggestion="add a file's name"
                )
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(b"".join(parts))
            return
        target = path.resolve()
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as f:
                f.writelines(parts)
                f.flush()
                os.fsync(f.fileno())
            if target.exists():
                if not os.access(target, os.W_OK):
                    raise PermissionError(13, "Permission denied")
                temporary.chmod(target.stat().st_mode)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise cannot_write(path, e) from None


def cannot_write(path: str | Path, e: Exception) -> FlowError:
    reason = getattr(e, "strerror", None) or e
    return FlowError(
        Diagnostic(
            "FL0801", f"`{path}` cannot be written: {reason}",
            suggestion="choose another place for the output, or check the folder and the space left on its disk",
        )
    )  # fmt: skip
