"""Weights of other networks: the released code's names, and what does not fit."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from networks.irevnet import Bottleneck, IRevNet


def released_names(model: IRevNet) -> dict[str, str]:
    """The name of each parameter and buffer in the authors' released code, with ours."""
    modules = {"norm": "bn1", "classifier": "linear"}
    bottlenecks = [name for name, part in model.named_modules() if isinstance(part, Bottleneck)]
    for block, name in enumerate(bottlenecks):
        modules[name] = f"stack.{block}.bottleneck_block"
    return {
        released + key.removeprefix(name): key
        for key in model.state_dict()
        for name, released in modules.items()
        if key.startswith(name + ".")
    }


def faults(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Which weights are missing, unexpected or of another shape; empty if none.

    Counts of batches may be missing, as PyTorch did not have them once.
    """
    missing = expected.keys() - given.keys()
    found = {
        "missing": [key for key in missing if not key.endswith("num_batches_tracked")],
        "unexpected": given.keys() - expected.keys(),
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected.keys() & given.keys()
            if given[key].shape != expected[key].shape
        ],
    }
    return "; ".join(f"{_listed(sorted(keys))} {what}" for what, keys in found.items() if keys)


def _listed(keys: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
