"""A head of a million classes, trained where its logits would not fit: on one process, or its classes over several.

    python examples/million_classes.py
    torchrun --nproc-per-node 2 examples/million_classes.py
    python examples/million_classes.py --margin 0.2          # an ArcFace-style margin before the loss

Features of width 512 and a (1000000, 512) weight, both of unit length, as in face recognition; a tenth of the labels is
wrong. Weight and gradient take 2 GB each, the logits of 128 rows would take half a GB and their gradient as much again.
"""

import argparse
import math
import os
import resource
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

import anl_kernels as ak

SCALE = 32.0  # logits are 32 cos


def with_margin(alpha: float, beta: float, margin: float):
    """alpha NCE + beta MAE of logits whose target has its angle widened by `margin` (ArcFace), as a RowLoss.

    Only the target's logit changes, so the statistics of the new row follow from those of the old one, and the logits
    are never there to be changed.
    """

    def value(s: ak.Statistics):
        angle = (s.target_logit / SCALE).clamp(-1 + 1e-7, 1 - 1e-7).acos() + margin
        target_logit = SCALE * angle.cos()
        others = s.lse + torch.log(-torch.expm1(s.target_log_prob))  # log sum exp without the target
        lse = torch.logaddexp(others, target_logit)
        log_prob = target_logit - lse
        neg_log_sum = s.neg_log_sum + s.num_classes * (lse - s.lse) - (target_logit - s.target_logit)
        return -alpha * log_prob / neg_log_sum - beta * torch.expm1(log_prob)

    return ak.RowLoss(value, needs=["target_log_prob", "target_logit", "lse", "neg_log_sum", "num_classes"])


def features_of(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What the network sees of an identity, (N, 64): waves whose phases are its own, and noise."""
    waves = torch.arange(1, 65) * 0.7391
    clean = torch.sin(labels.unsqueeze(1) * waves)
    return clean + 0.1 * torch.randn(clean.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()

    group = None
    if "WORLD_SIZE" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rank, world = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)

    generator = torch.Generator().manual_seed(0)  # the same rows and the same network on every process
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, args.width))
    torch.manual_seed(1 + rank)
    classes = len(range(rank, args.classes, world))  # a contiguous slice of the classes on each
    weight = torch.nn.Parameter(torch.empty(classes, args.width).normal_(std=args.width**-0.5))
    optimizer = torch.optim.SGD([*network.parameters(), weight], lr=args.lr)

    labels = torch.randint(args.classes, (args.rows,), generator=generator)
    features = features_of(labels, generator)
    wrong = torch.rand(args.rows, generator=generator) < 0.1
    labels[wrong] = torch.randint(args.classes, (args.rows,), generator=generator)[wrong]

    alpha = args.classes * math.log(args.classes) / 4.0  # NCE's gradient is that of cross entropy over K log K
    criterion = alpha * ak.NCE() + ak.NNCE()
    if args.margin:
        criterion = with_margin(alpha, 1.0, args.margin)
    for step in range(args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()  # before the loss, which makes the new gradient in forward
        hidden = SCALE * F.normalize(network(features), dim=1)
        loss = ak.linear_robust_loss(hidden, weight, labels, criterion, min_prob=1e-4 / args.classes, class_group=group)
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # back to unit length
            weight /= weight.norm(dim=1, keepdim=True)
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6g}, {time.perf_counter() - start:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # KiB on Linux
    print(f"process {rank} of {world}: {classes} classes, peak memory {peak:.2f} GiB", flush=True)
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
