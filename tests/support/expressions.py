"""The losses under test, as the oracle takes them and as the package does."""

import torch


def single(name, **parameters):
    return ((1.0, name, parameters),)


# name -> terms as the oracle takes them; `expression` turns them into the package's own.
EXPRESSIONS = {
    "ce": single("ce"),
    "nce": single("nce"),
    "nnce": single("nnce"),
    "fl": single("fl", gamma=0.5),
    "fl2": single("fl", gamma=2.0),
    "nfl": single("nfl", gamma=0.5),
    "nnfl": single("nnfl", gamma=0.5),
    "nnfl2": single("nnfl", gamma=2.0),
    "mae": single("mae"),
    "rce": single("rce", floor=1e-4),
    "gce": single("gce", q=0.7),
    "agce": single("agce", a=1.0, q=2.0),
    "aul": single("aul", a=5.5, q=3.0),
    "ael": single("ael", a=2.5),
    "mse": single("mse"),
    "amse": single("amse", a=30.0),
    "amse2.5": single("amse", a=2.5),
    "jal_ce": ((1.0, "nce", {}), (1.0, "amse", {"a": 30.0})),
    "jal_fl": ((1.0, "nfl", {"gamma": 0.5}), (1.0, "amse", {"a": 30.0})),
    "eps_ce": single("eps_ce", m=1e5),
    "eps_ce3": single("eps_ce", m=3.0),
    "sce": ((0.5, "ce", {}), (1.5, "rce", {"floor": 1e-3})),
    "anl_ce": ((1.0, "nce", {}), (1.0, "nnce", {})),
    "anl_fl": ((5.0, "nfl", {"gamma": 0.5}), (2.0, "nnfl", {"gamma": 0.5})),
    "nce+rce": ((1.0, "nce", {}), (0.5, "rce", {"floor": 1e-4})),
    "nce+mae": ((1.0, "nce", {}), (1.0, "mae", {})),
    "nfl+rce": ((1.0, "nfl", {"gamma": 0.5}), (1.0, "rce", {"floor": 1e-4})),
    "nfl+mae": ((1.0, "nfl", {"gamma": 0.5}), (1.0, "mae", {})),
    "nce+agce": ((1.0, "nce", {}), (4.0, "agce", {"a": 6.0, "q": 1.5})),
    "nce+aul": ((1.0, "nce", {}), (4.0, "aul", {"a": 6.3, "q": 1.5})),
    "nce+ael": ((1.0, "nce", {}), (4.0, "ael", {"a": 5.0})),
    "eps_ce+mae": ((0.01, "eps_ce", {"m": 1e5}), (10.0, "mae", {})),
    "everything": (
        (0.1, "ce", {}),
        (1.0, "nce", {}),
        (2.0, "nnce", {}),
        (0.2, "fl", {"gamma": 0.7}),
        (1.5, "nfl", {"gamma": 0.7}),
        (0.5, "nnfl", {"gamma": 0.7}),
        (0.3, "mae", {}),
        (0.1, "rce", {"floor": 1e-4}),
        (0.4, "gce", {"q": 0.7}),
        (0.1, "agce", {"a": 1.0, "q": 2.0}),
        (0.05, "aul", {"a": 5.5, "q": 3.0}),
        (0.7, "ael", {"a": 2.5}),
        (0.6, "mse", {}),
        (0.3, "amse", {"a": 2.5}),
        (0.2, "eps_ce", {"m": 3.0}),
    ),
}
# On awkward shapes three stand for all: every sum of the second sweep is in one of them; of the first, in one of four.
REPRESENTATIVE = ("anl_ce", "anl_fl", "nce+rce")
EVERY_STATISTIC = (*REPRESENTATIVE, "jal_ce")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}  # half an ulp of 1


def dtype_id(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def term(name, **parameters):
    """The package's term of this name: "eps_ce" is EpsCE."""
    from anl_kernels.losses import BUILT_IN

    return {t.__name__.lower(): t for t in BUILT_IN}[name.replace("_", "")](**parameters)


def expression(terms):
    """The package's expression for the oracle's terms."""
    parts = [coefficient * term(name, **parameters) for coefficient, name, parameters in terms]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def row_loss_expression(terms):
    """The same through RowLoss: every term's `value`, differentiated by autograd instead of by hand."""
    import anl_kernels as ak

    built = [(c, term(name, **parameters)) for c, name, parameters in terms]
    gammas = {p["gamma"] for _, _, p in terms if "gamma" in p}
    return ak.RowLoss(lambda s: sum(c * t.value(s) for c, t in built), gamma=gammas.pop() if gammas else None)
