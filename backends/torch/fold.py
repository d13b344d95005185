"""Folded networks with the weights that follow from those of a module (see `derive/folding.py`)."""

from __future__ import annotations

from typing import Any

import torch
from flowlang.backends.torch.codegen import ClassScope, Generator, module_text
from flowlang.backends.torch.load import instantiate

from flowlang.derive.analyse import Analyses
from flowlang.derive.folding import Folded


def folded_source(folded: Folded, analyses: Analyses, origin: str, *, standalone: bool) -> tuple[str, str]:
    """The text of a folded network and the name of its class."""
    made = Generator(folded.region, analyses, origin).generate()
    return module_text(
        made, standalone=standalone, title=f"net {folded.region.name}, folded for inference", origin=origin
    ), made.root


def folded_module(folded: Folded, old: Any, root: Any, analyses: Analyses, origin: str) -> Any:
    """The folded network as a module; `root` is the region of `old`."""
    module = instantiate(*folded_source(folded, analyses, origin, standalone=False))
    kept = next((t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point()), None)
    if kept is not None:
        module.to(device=kept.device, dtype=kept.dtype)
    with torch.no_grad():
        Fill(folded, analyses, Generator(root, analyses, origin), Generator(folded.region, analyses, origin)).put(
            root, old, module
        )
    return module.eval()


class Fill:
    """Walks through a network and its folded form together."""

    def __init__(self, folded: Folded, analyses: Analyses, before: Generator, after: Generator):
        self.folded, self.analyses = folded, analyses
        self.before, self.after = before, after

    def put(self, region: Any, old: Any, new: Any) -> None:
        other = self.folded.made[id(region)]
        if other is region:
            new.load_state_dict(old.state_dict())
            return
        mine, theirs = ClassScope(self.before, region), ClassScope(self.after, other)
        recipe = self.folded.recipes.get(id(region))
        values = self.values(recipe.region, old) if recipe is not None else []
        fresh = dict(zip(recipe.names, values, strict=True)) if recipe is not None else {}
        for name, attribute in theirs.attributes.items():
            if name in fresh:
                getattr(new, attribute).copy_(fresh[name])
            else:
                copy(getattr(old, mine.attributes[name]), getattr(new, attribute))
        for name, child in other.children.items():
            if child.shared:
                continue
            inner = region.children[name].region
            a, b = getattr(old, mine.children[name]), getattr(new, theirs.children[name])
            for first, second in zip(a, b, strict=True) if child.count > 1 else [(a, b)]:
                self.put(inner, first, second)

    def values(self, region: Any, old: Any) -> list[torch.Tensor]:
        """What a recipe gives for a module's weights, in float64."""
        made = instantiate(*self.text(region)).double()
        made.load_state_dict(old.state_dict())
        found = made.eval()._forward()
        return list(found) if isinstance(found, tuple) else [found]

    def text(self, region: Any) -> tuple[str, str]:
        generated = Generator(region, self.analyses, "recipe").generate()
        return module_text(generated, standalone=False, title="recipe", origin="recipe"), generated.root


def copy(old: Any, new: Any) -> None:
    if isinstance(old, torch.nn.Module):
        new.load_state_dict(old.state_dict())
    else:
        new.copy_(old)


__all__ = ["folded_module", "folded_source"]
