"""The backends: what each of them does for a call, `Backend`. They are modules, thin adapters between tensors and what
computes: pointers and strides for compiled code, views of lanes for Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from ..call import Call

NAMES = ("cuda", "triton", "cpu", "reference")  # fastest first; each is the name of a module here


class LaunchRefused(RuntimeError):
    """The device refuses every way in which a backend could run a call. Nothing has run, and nothing is written."""


class Backend(Protocol):
    """What every backend is and does.

    Logits are (N, K), (K,) or (N, K, d1, ...) with any strides and of any of layout.LOGIT_DTYPES, where a slice's are
    meant (N, K_r, ...); rows are in the target's shape, and there may be none. The call and the shapes are checked, and
    `cannot_run` lets them pass. Fields of tables and coefficients are in the order of the enums in row_math.py. acc:
    float64 for float64 logits, else float32.

    Under torch.compile, and for tensor subclasses, a call has only what ops.py makes it of: no `expression`, for one.
    """

    NAME: str
    PURPOSE: str  # a line for `anl_kernels.backends()`

    def unavailable(self) -> str | None:
        """Why nothing runs on it here; None if it does."""

    def cannot_run(self, logits: Tensor, call: Call) -> str | None:
        """Why it cannot run a call of these logits; None if it can.

        It may depend on their device and on inplace, for which registry.choose remembers the answer, and from 2^31
        logits on, on the shape.
        """

    def device_type(self) -> str:
        """The type of the devices whose tensors it takes ("cuda"); of those of the reference, one."""

    def slice_stats(self, call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
        """Sums over a slice's classes, each row's target left out, float64.

        Args:
            logits: (N, K_r, ...), K_r >= 1.
            target: (N, ...), int64: a class of the slice, ELSEWHERE (-1), or IGNORED (-2): that row's logits are not
                read and its sums are not specified.
            lse: None, or (2, N, ...) float64: the max and log sum exp(z - max) of the whole row.

        Returns:
            Without lse (NUM_FIRST_SUMS, N, ...), of the classes that exist (logit > -inf); the max is -inf if none
            does; max - z_j sums to NaN where a logit is NaN or +inf. With it (NUM_SECOND_SUMS, N, ...). Sums that
            call.needs does not ask for are not specified.
        """

    def row_grad(
        self, call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy
    ) -> Tensor:
        """grad_output (a number, or one per row; None: 1) times the gradient of `coefs` (NUM_COEFS, *rows), acc.

        In the logits' memory if call.inplace (layout.overwritten), else in new memory (layout.new_grad), of the logits'
        dtype. entropy: None, or (log_q (K,), s ()), whose s p_j (log_q_j - sum_k p_k log_q_k) is added. An ignored row,
        whose INV_SUM is 0, has a gradient of 0 even where grad_output or s is NaN.
        """

    def column_sums(self, logits: Tensor, coefs: Tensor) -> Tensor:
        """The sum over the rows of p, (K,), float64, in an order that depends on the shape alone.

        coefs: (2, ...) or more, of which MAX and INV_SUM are read.
        """

    def scaled(self, grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
        """grad * factor, a number on the device; unless `keep` in place, and without touching it if factor is 1."""


@runtime_checkable
class FusedBackend(Backend, Protocol):
    """A backend that takes whole rows in one pass. The reference is none: it has formulas for autograd instead.

    target: (N, ...), of any of layout.TARGET_DTYPES. A row with call.ignore_index counts nowhere, and its logits are
    not read. A label that is no class raises layout.bad_label; where that would wait for a device, the row is NaN.
    """

    def row_loss(
        self,
        call: Call,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        grad: Tensor | None,
        coefs: Tensor | None,
    ) -> Tensor:
        """The loss of the built-in terms `call.terms`, reduced, acc. The entropy and the groups are the caller's.

        `weight`, per class, weighs the rows as in reduction.reduce_rows. `grad` (like the logits, or the logits
        themselves) is filled with the gradient for grad_output = 1 if given, `coefs` (NUM_COEFS, *rows), acc, with what
        row_grad takes: the rows' weights and the denominator of a mean are in both.
        """

    def row_stats(self, call: Call, logits: Tensor, target: Tensor) -> Tensor:
        """The statistics' table (NUM_STATS, *rows), float64. Fields that call.needs does not ask for are not
        specified; an ignored row's are finite."""


def check_name(name: str, asked_by: str) -> None:
    if name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"{asked_by}={name!r}: there is no such backend; there are {known} and 'auto'")


def check_device(logits: Tensor, device_type: str) -> str | None:
    if logits.device.type != device_type:
        return f"the logits are on {logits.device}"
    return None
