"""Frozen heads with unit rows, as :class:`benchmark.core.data.Task` wants them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.core.errors import UsageError
from benchmark.testbeds.declared.backbones import Embed

#: Prompt sets by the name they have in open_clip.
TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def label_names(embed: Embed, classes: Sequence[str], prompts: str | Sequence[str]) -> Tensor:
    """The mean embedding of each class's prompts, (classes, d) unit rows.

    The zero-shot head of CLIP (arXiv 2103.00020, section 3.1.4): every prompt's embedding is a unit
    vector before the mean is taken.
    """
    fill = _fillers(prompts)
    # One call for all: the text tower is read once.
    texts = [write(name) for name in classes for write in fill]
    vectors = functional.normalize(embed(texts).float(), dim=-1)
    means = vectors.reshape(len(classes), len(fill), -1).mean(1)
    return functional.normalize(means, dim=-1)


def _fillers(prompts: str | Sequence[str]) -> list[Callable[[str], str]]:
    if isinstance(prompts, str):
        import open_clip

        return list(getattr(open_clip, TEMPLATES[prompts]))
    return [functools.partial(_filled, prompt) for prompt in prompts]


def _filled(prompt: str, name: str) -> str:
    return prompt.replace("{}", name)


def linear_probe(features: Tensor, labels: Tensor, classes: int, c: float = 0.01) -> Tensor:
    """The directions of a multinomial logistic regression, (classes, d) unit rows.

    Args:
        features: (n, d) unit vectors of the base.
        labels: (n,) class indices; every class must occur.
        c: inverse strength of the L2 penalty, on features of unit variance.

    logits = scale · f·hᵀ leaves no room for an intercept nor for rows of different length. So the
    regression (scikit-learn) has no intercept, and features are divided by one number, the root
    mean square of their deviation from their mean: one number, not one per dimension, keeps the
    angles that the logits are made of. They are not centred: the mean, which all unit features
    share (its length is 0.7 to 0.8 on ViT-Tiny), does what an intercept would, at hardly any
    penalty. The mean row is subtracted, which changes no softmax, and rows are brought to unit
    length. Measured on ViT-Tiny at 64 pixels, 2,000 rows, c = 0.01: 72.8 % on MNIST and 69.2 % on
    notMNIST, against 73.0 and 69.8 before rows were brought to unit length; that length was 16 to
    22, hence the default scale of 20.

    Raises:
        UsageError: a class without an example, or fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression

    present = labels.unique()
    if len(present) < max(2, classes):
        raise UsageError(
            f"a linear probe needs examples of at least two classes and of each: {len(present)} of "
            f"{classes} occur among the {len(labels)} rows it is fitted on; raise probe"
        )
    x = features.double()
    spread = (x - x.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    fitted = LogisticRegression(C=c, fit_intercept=False, max_iter=1000, tol=1e-3)
    fitted.fit((x / spread).numpy(), labels.numpy())
    rows = torch.from_numpy(fitted.coef_)
    if classes == 2:
        rows = torch.cat([-rows, rows])
    return functional.normalize(rows - rows.mean(0), dim=-1).float()
