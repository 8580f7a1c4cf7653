"""DTensor logits, sharded along the classes: their local part, and the class group that they bring with them."""

from __future__ import annotations

import sys

import torch

from ..layout import refuse_leaf, resolved


def is_dtensor(tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def of_dtensors(logits, target, weight, class_group, inplace):
    """(logits, target, weight, class group) as local tensors; others stay as they are."""
    target, weight = replicated("target", target), replicated("weight", weight)
    if not is_dtensor(logits):
        return logits, target, weight, class_group
    if class_group is not None:
        raise ValueError("DTensor logits bring their own class group: leave class_group out, or give logits.to_local()")
    if inplace and torch.is_grad_enabled():
        refuse_leaf(logits)
    return logits.to_local(), target, weight, _group_of_classes(logits)


def _group_of_classes(logits):
    """The process group over which the classes are sharded; None if every rank has all of them."""
    from torch.distributed.tensor import Replicate, Shard

    dim, group = min(1, logits.dim() - 1), None
    for axis, placement in enumerate(logits.placements):
        if placement == Replicate():
            continue
        if placement not in (Shard(dim), Shard(dim - logits.dim())) or group is not None:
            raise ValueError(
                f"DTensor logits must be replicated or sharded along the classes (dimension {dim}) of one mesh "
                f"dimension, got {logits.placements}; for rows on several ranks give logits.to_local() and batch_group"
            )
        group = logits.device_mesh.get_group(axis)
    return group


def replicated(name: str, tensor, remedy: str | None = None):
    """The local tensor of a replicated DTensor; other tensors as they are."""
    if not is_dtensor(tensor):
        return tensor
    if any(not placement.is_replicate() for placement in tensor.placements):
        remedy = remedy or f"give {name}.full_tensor()"
        raise ValueError(f"a DTensor {name} must be replicated, got {tensor.placements}: {remedy}")
    return resolved(tensor.to_local())
