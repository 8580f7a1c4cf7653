"""Random calls of one GPU backend through the public functions, made for compute-sanitizer.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own size. Values are checked
too, against the reference backend in float64, roughly: the conformance suite is where digits are compared.
"""

import argparse
import math
import random
import time

import torch

import anl_kernels as ak

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES = (2, 3, 10, 33, 100, 127, 1000, 1025, 4099, 32_771, 131_075, 300_001)
LOSSES = (
    ak.NCE() + ak.NNCE(),
    ak.NFL() + ak.NNFL(),
    ak.NCE() + ak.RCE(),
    ak.CE() + ak.GCE(),
    ak.RowLoss(lambda s: s.target_prob / s.neg_log_sum),
)
LAYOUTS = ("rows", "padded", "transposed", "spatial", "channels_last")


def lay_out(values, layout, dtype):
    rows, classes = values.shape
    if layout == "padded":
        room = torch.empty(rows, classes + random.choice((1, 8)), dtype=dtype, device=values.device)
        return room[:, :classes].copy_(values)
    if layout == "transposed":
        return values.to(dtype).t().contiguous().t()
    if layout == "spatial":
        return values.to(dtype).view(1, rows, classes).transpose(1, 2).contiguous()
    if layout == "channels_last":
        return values.to(dtype).view(1, rows, classes).transpose(1, 2)
    return values.to(dtype)


def one_call(backend: str, device: str) -> str:
    classes, dtype, layout = random.choice(CLASSES), random.choice(DTYPES), random.choice(LAYOUTS)
    rows = random.choice((1, 2, 7, 33)) if classes < 5000 else random.choice((1, 3))
    values = torch.randn(rows, classes, device=device) * random.choice((1.0, 5.0, 20.0))
    logits = lay_out(values, layout, dtype)
    target = torch.randint(classes, logits[:, 0].shape, device=device)
    target[torch.rand(target.shape, device=device) < 0.2] = -100
    loss = random.choice(LOSSES)
    reduction = random.choice(("sum", "none"))
    options = {"reduction": reduction, "recompute": random.choice((True, False))}
    if reduction == "sum":
        options["entropy_weight"] = random.choice((0.0, 0.5))
    results = []
    for name, z in ((backend, logits), ("reference", logits.double())):
        z = z.detach().requires_grad_()
        value = loss(z, target, backend=name, **options).sum()
        results.append((value.double(), torch.autograd.grad(value, z)[0].double()))
    (value, grad), (exact_value, exact_grad) = results
    about = f"{rows} x {classes} {dtype} {layout} {loss} {options}"
    digits = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 2e-3)
    assert (value - exact_value).abs() <= digits * exact_value.abs() + 1e-3, f"{about}: {value} for {exact_value}"
    assert (grad - exact_grad).norm() <= digits * exact_grad.norm() + 1e-4, about
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", help="cuda (may be given again)")
    parser.add_argument("--calls", type=int, default=60, help="of each backend")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no further call after so many, of each backend"
    )
    args = parser.parse_args()
    for backend in args.backend or ["cuda"]:
        random.seed(0)
        torch.manual_seed(0)
        device, start, calls = str(ak.registry.device_of(backend)), time.monotonic(), 0
        while calls < args.calls and (calls == 0 or time.monotonic() - start < args.seconds):
            print(backend, one_call(backend, device), flush=True)
            calls += 1
        print(f"{backend}: {calls} calls, clean")


if __name__ == "__main__":
    main()
