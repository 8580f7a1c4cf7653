"""Classes split into slices: their sums and the merge (`slices`), over the ranks of a process group (`class_group`),
and logits that are DTensors (`dtensor`)."""
