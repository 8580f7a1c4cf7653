"""Wrong labels against the transition matrix asked for."""

import pytest
import torch

from benchmarks.noisy_labels import noise
from benchmarks.noisy_labels.noise import Noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(counts):
    """Labels with these many images a class, shuffled."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator(9))]


UNEVEN = [500, 37, 1, 0, 250, 999, 64, 65, 3, 130]


def made(text, labels, dataset="mnist", seed=0, classes=10, features=None):
    kind = Noise.parse(text)
    return noise.wrong_labels(kind, labels, noise.confused_with(dataset, classes), generator(seed), features)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_every_cell_is_the_matrix_asked_for_to_within_one_image(kind, rate, dataset):
    labels = labels_of(UNEVEN)
    noisy = made(f"{kind}:{rate}", labels, dataset)
    matrix = noise.transition(Noise(kind, rate), noise.confused_with(dataset, 10))
    assert torch.allclose(matrix.sum(1), torch.ones(10))
    expected = matrix * torch.tensor(UNEVEN)[:, None]
    # A whole number next to each share; the flips of a class are then shared among the others.
    assert ((noise.labelled_as(labels, noisy, 10) - expected).abs() < 2.0).all()
    flips = torch.tensor(UNEVEN) - noise.labelled_as(labels, noisy, 10).diagonal()
    assert ((flips - (torch.tensor(UNEVEN) - expected.diagonal())).abs() < 1.0).all()


def test_the_share_over_all_classes_is_met_even_with_one_image_a_class():
    labels = torch.arange(20000)
    noisy = noise.symmetric(labels, 0.4, 20000, generator())
    assert abs((noisy != labels).sum().item() - 8000) <= 1
    assert ((noisy >= 0) & (noisy < 20000)).all()
    first, second = (noisy != labels)[:10000].sum(), (noisy != labels)[10000:].sum()
    assert abs(first - second) <= 2


def test_a_class_is_flipped_to_every_other_class_and_never_to_itself():
    labels = torch.zeros(900, dtype=torch.int64)
    counts = noise.labelled_as(labels, noise.symmetric(labels, 1.0, 10, generator()), 10)[0]
    assert counts.tolist() == [0] + [100] * 9
    starts = {noise.symmetric(torch.zeros(1, dtype=torch.int64), 1.0, 10, generator(s)).item() for s in range(200)}
    assert starts == set(range(1, 10))


def test_class_maps_are_the_published_ones():
    def pairs(dataset, classes):
        return {c: int(o) for c, o in enumerate(noise.confused_with(dataset, classes)) if c != o}

    assert pairs("mnist", 10) == {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
    assert pairs("cifar10", 10) == {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
    found = pairs("cifar100", 100)
    assert len(found) == 100 and found[0] == 1 and found[4] == 0 and found[99] == 95 and found[57] == 58


def test_seeds_choose_the_images():
    labels = labels_of(UNEVEN)
    for text in ("symmetric:0.4", "asymmetric:0.4"):
        assert torch.equal(made(text, labels, seed=1), made(text, labels, seed=1))
        assert not torch.equal(made(text, labels, seed=1), made(text, labels, seed=2))
    hit = torch.stack([made("symmetric:0.4", labels, seed=seed) != labels for seed in range(400)]).float().mean(0)
    assert ((hit - 0.4).abs() < 0.15).all()  # six standard deviations: no image is safe, none is doomed


def test_clean_labels_are_a_copy():
    labels = labels_of(UNEVEN)
    noisy = made("clean", labels)
    assert torch.equal(noisy, labels) and noisy.data_ptr() != labels.data_ptr()


def test_instance_dependent_noise_has_its_rate_and_depends_on_the_image():
    torch.manual_seed(0)
    labels = labels_of([400] * 10)
    features = torch.randn(4000, 1, 4, 4)
    features[:200] = features[200:400]  # pairs of equal images
    labels[:200] = labels[200:400]
    noisy = made("instance:0.4", labels, features=features)
    assert torch.equal(noisy, made("instance:0.4", labels, features=features))
    wrong = noisy != labels
    for label in range(10):
        assert abs(wrong[labels == label].float().mean() - 0.4) < 0.03  # own rates deviate by 0.1, their mean by 0.005
    both = wrong[:200] & wrong[200:400]
    same = noisy[:200][both] == noisy[200:400][both]
    assert same.float().mean() > 0.6  # the class an image becomes is its own: by chance it would be 1/9
    counts = noise.labelled_as(labels, noisy, 10)
    assert (counts.fill_diagonal_(0) > 0).sum() > 80  # and another image of the class becomes another


@pytest.mark.parametrize(
    "text", ["symmetric", "symmetric:", "symmetric:x", "symmetric:1.5", "clean:0.1", "human", "flip:0.2"]
)
def test_noise_that_is_none_is_told(text):
    with pytest.raises(ValueError, match="none of clean"):
        Noise.parse(text)


@pytest.mark.parametrize("text", ["clean", "symmetric:0.4", "asymmetric:0.45", "instance:0.3", "human:worse"])
def test_noise_is_written_as_it_is_read(text):
    assert str(Noise.parse(text)) == text
