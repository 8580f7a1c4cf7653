"""The gradient in the logits' own memory (inplace=True): who notices, and where it is refused."""

import helpers
import oracle
import pytest
import torch
import torch.utils.checkpoint
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, THERE, dtype_id, expression

import anl_kernels as ak

SOME = pytest.mark.parametrize("name", REPRESENTATIVE)


def batch(dtype=torch.float32, classes=17):
    return helpers.batch(classes, dtype)


@THERE
@pytest.mark.few(name=["anl_ce"], dtype=[torch.float32, torch.bfloat16])
@SOME
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["rows", "padded", "every_other_class", "transposed", "spatial", "channels_last"])
def test_inplace_writes_the_gradient_over_the_logits(fused, name, dtype, layout):
    values, labels = batch(dtype)
    logits, target = helpers.lay_out(layout, values, labels)
    hidden = helpers.Alias.apply(logits.requires_grad_())
    address, version = hidden.data_ptr(), hidden._version
    grads = []
    hidden.register_hook(grads.append)
    loss = ak.robust_loss(
        hidden, target, expression(EXPRESSIONS[name]), inplace=True, backend=fused.name, reduction="sum"
    )
    loss.backward()
    assert hidden._version > version
    assert grads[0].data_ptr() == address
    assert torch.equal(oracle.as_rows(hidden.detach()).nan_to_num(7), oracle.as_rows(grads[0]).nan_to_num(7))
    helpers.assert_as_accurate(
        loss.detach(),
        oracle.as_rows(grads[0]),
        labels,
        helpers.truth(values, labels, EXPRESSIONS[name], reduction="sum"),
    )


@THERE
def test_inplace_is_noticed_by_whoever_saved_the_logits(fused):
    values, labels = batch()
    leaf = values.clone().requires_grad_()
    hidden = leaf.nan_to_num().exp()  # exp saves its result
    loss = ak.anl_ce(hidden, labels, inplace=True, backend=fused.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@THERE
def test_inplace_notices_a_later_write_to_the_logits(fused):
    leaf = torch.randn(6, 9, requires_grad=True)
    hidden = leaf + 1
    loss = ak.anl_ce(hidden, torch.arange(6), inplace=True, backend=fused.name)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@THERE
@pytest.mark.parametrize(
    "use",
    {
        "logits": lambda hidden, view: hidden.pow(2).sum(),
        "cross_entropy": lambda hidden, view: torch.nn.functional.cross_entropy(view, torch.arange(6)),
        "another_view": lambda hidden, view: hidden.view(-1)[3] * 2,
        "part": lambda hidden, view: hidden[:1].sum(),
    }.items(),
    ids=lambda use: use[0],
)
@pytest.mark.parametrize("of_view", [False, True], ids=["logits", "view"])
def test_inplace_notices_a_later_use_of_the_logits(one_fused, use, of_view):
    """What reads the logits after the loss reads their gradient: its own backward pass says so."""
    leaf = torch.randn(6, 9, requires_grad=True)
    hidden = leaf * 1
    view = hidden.view(6, 9) if of_view else hidden
    loss = ak.anl_ce(view, torch.arange(6), inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="used after a loss with inplace=True"):
        (loss + use[1](hidden, view)).backward()


@THERE
def test_inplace_of_a_part_that_split_made_is_noticed(one_fused):
    """Autograd cannot mark it as overwritten; whoever saved it is told all the same."""
    hidden = torch.randn(6, 9, requires_grad=True) * 1
    first, _ = hidden.split([5, 4], 1)
    saved = first.exp() * first
    loss = ak.anl_ce(first, torch.arange(6) % 5, inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="modified (by an inplace operation|inplace)"):
        (loss + saved.sum()).backward()


@THERE
def test_inplace_of_a_slice_leaves_the_rest(one_fused):
    """The rest of the tensor may be used; the slice, by whatever name, may not."""
    grads, leaf = [], torch.randn(6, 9)
    for inplace in (False, True):
        z = leaf.clone().requires_grad_()
        hidden = z * 2
        first, second = hidden[:, :5], hidden[:, 5:]
        loss = ak.anl_ce(first, torch.arange(6) % 5, inplace=inplace, backend=one_fused.name)
        (loss + torch.nn.functional.cross_entropy(second, torch.arange(6) % 4)).backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads)
    hidden = leaf.clone().requires_grad_() * 2
    loss = ak.anl_ce(hidden[:, :5], torch.arange(6) % 5, inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="used after a loss with inplace=True"):
        (loss + hidden[2, 3]).backward()


@THERE
@pytest.mark.parametrize(
    "logits",
    [
        lambda: torch.randn(12).as_strided((4, 3), (2, 1)),
        lambda: torch.randn(3).expand(4, 3),
        lambda: torch.randn(40).as_strided((2, 3, 4), (4, 4, 1)),
    ],
    ids=["as_strided", "expanded", "rows_over_classes"],
)
def test_inplace_of_overlapping_memory_is_refused(fused, logits):
    z = logits()
    z = torch.randn(50, requires_grad=True).mul(1).as_strided(z.shape, z.stride())
    target = torch.zeros(z.shape[:1] + z.shape[2:], dtype=torch.int64)
    with pytest.raises(ValueError, match="share memory"):
        ak.anl_ce(z, target, inplace=True, backend=fused.name)


@THERE
def test_inplace_of_what_would_have_to_be_copied_is_refused(one_fused):
    leaf = torch.randn(2, 5, 3, 4, requires_grad=True)
    hidden = (leaf * 1).transpose(2, 3)
    with pytest.raises(ValueError, match="one run of memory"):
        ak.anl_ce(hidden, torch.zeros(2, 4, 3, dtype=torch.int64), inplace=True, backend=one_fused.name)


@THERE
def test_inplace_of_a_linear_layers_output(fused):
    g = helpers.generator(0)
    x, weight = helpers.randn(24, 5, generator=g), helpers.randn(17, 5, generator=g)
    _, labels = batch()
    grads = []
    for inplace in (False, True):
        w = weight.clone().requires_grad_()
        ak.anl_ce(torch.nn.functional.linear(x, w), labels, inplace=inplace, backend=fused.name).mul(3.7).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@THERE
def test_inplace_of_a_leaf_is_refused(fused):
    values, labels = batch()
    leaf = values.clone().requires_grad_()
    for logits in (leaf, leaf.view(leaf.shape), leaf[:]):
        with pytest.raises(ValueError, match="leaf"):
            ak.anl_ce(logits, labels, inplace=True, backend=fused.name)
    assert torch.equal(leaf.detach().nan_to_num(9), values.nan_to_num(9))


@THERE
def test_inplace_without_grad_writes_nothing(fused):
    values, labels = batch()
    logits = values.clone()
    loss = ak.anl_ce(logits, labels, inplace=True, backend=fused.name)
    assert torch.equal(logits.nan_to_num(9), values.nan_to_num(9))
    torch.testing.assert_close(loss, ak.anl_ce(values, labels, backend=fused.name), rtol=0, atol=0)


def test_the_reference_does_not_write_in_place():
    with pytest.raises((RuntimeError, ValueError), match="inplace"):
        ak.anl_ce(torch.randn(3, 4), torch.tensor([0, 1, 2]), inplace=True, backend="reference")
