"""Weights that the authors' released code has trained, in our networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from networks.irevnet import Bottleneck, IRevNet


def load_released(model: IRevNet, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the weights of a network that the authors' released code has trained.

    Args:
        model: An i-RevNet of the same settings.
        state_dict: The entry ``"state_dict"`` of a released checkpoint, its keys with or
            without the prefix ``module.``. Counts of batches may be missing, as PyTorch did not
            have them when the weights were published.

    Raises:
        ValueError: If a key is missing or unexpected, or a tensor has another shape; nothing is
            loaded then.
    """
    if "state_dict" in state_dict:
        raise ValueError(
            "load_released takes the entry 'state_dict' of a checkpoint, got the whole checkpoint. "
            "Call load_released(model, checkpoint['state_dict'])."
        )
    given = {key.removeprefix("module."): value for key, value in state_dict.items()}
    ours = released_names(model)
    own = model.state_dict()
    faults = find_faults({key: own[name] for key, name in ours.items()}, given)
    if faults:
        raise ValueError(
            f"These weights belong to another network than this one: {describe(faults)}. Compare "
            "blocks, widths, kernel_sizes and num_classes."
        )
    model.load_state_dict(own | {ours[key]: value for key, value in given.items()})


def find_faults(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """The weights of a network that are missing, unexpected or of another shape.

    Counts of batches may be missing, as PyTorch did not have them once.
    """
    faults = {
        "missing": [
            key for key in expected.keys() - given.keys() if not key.endswith("num_batches_tracked")
        ],
        "unexpected": list(given.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected.keys() & given.keys()
            if given[key].shape != expected[key].shape
        ],
    }
    return {what: sorted(keys) for what, keys in faults.items() if keys}


def describe(faults: Mapping[str, Sequence[str]]) -> str:
    """Faults in words."""
    return "; ".join(f"{_listed(keys)} {what}" for what, keys in faults.items())


def released_names(model: IRevNet) -> dict[str, str]:
    """The name of each parameter and buffer in the released code, with ours."""
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


def _listed(keys: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
