"""What the tests share, under one name: the losses under test, logits of every kind and layout, the comparison with the
oracle."""

# ruff: noqa: F403
from comparison import *
from expressions import *
from problems import *


def compile_counter():
    """A backend of torch.compile that counts its graphs; imported late, which takes more than a second."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")
