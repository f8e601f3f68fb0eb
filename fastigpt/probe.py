"""What a model's layers know: linear probes on mean-pooled features of every layer.

As in the paper (Chen et al., "Generative Pretraining from Pixels", 2020): the normed hidden state of a layer, averaged
over the positions, and logistic regression on it, fitted with L-BFGS. The same probe on raw pixels and on a model of
the same shape with random weights says how much of the accuracy is training's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastigpt.files import replacing
from fastigpt.model import ImageGPT, Model
from fastigpt.probe_data import Labelled

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the inverse of the penalty
_TEST, _VALIDATION = 0.2, 0.2  # shares of each class


@dataclass(frozen=True)
class Probe:
    """Accuracies on test images, in [0, 1], of the probes of one fact. trained, untrained: by layer, 0 (the embeddings)
    to n_layer. commonest: the share of the commonest class, which is what a guess gets."""

    fact: str
    n_classes: int
    n_train: int
    n_test: int
    commonest: float
    pixels: float
    trained: tuple[float, ...]
    untrained: tuple[float, ...]


def probe(model: Model, data: Labelled, *, seed: int = 0, progress: bool | None = False) -> list[Probe]:
    """Probes every layer for every fact. seed: of the split and of the untrained model's weights.

    A fact's images are split by class: three fifths to fit, one fifth to choose C by, one fifth to test a probe that
    is fitted again on the other four. Inputs are standardised by the images that are fitted. Every layer's features
    take a pass of their own through the layers before it, so all of them cost (n_layer + 1) / 2 times the last one's.
    progress: None = a bar if a person is watching stderr. Raises ValueError if the model has no palette.
    """
    if not isinstance(model, ImageGPT):
        raise ValueError(f"{model.name} is no Image GPT: there is no untrained model of its shape to compare it with")
    tokens = model.encode(data.pixels)
    untrained = ImageGPT.from_config(
        model.config, seed=seed, device=model.device, dtype=model.dtype, backend=model.backend
    )
    depths = range(model.config.n_layer + 1)
    with tqdm(
        total=2 * len(depths) + len(data.labels), disable=None if progress is None else not progress, leave=False
    ) as bar:
        features: dict[str, list[np.ndarray]] = {}
        for name, network in (("trained", model), ("untrained", untrained)):
            features[name] = []
            for depth in depths:
                bar.set_description(f"{name}, layer {depth}")
                features[name].append(network.features(tokens, depth).numpy())
                bar.update()
        pixels = data.pixels.reshape(len(data.pixels), -1).astype(np.float32)
        found = []
        for fact, labels in data.labels.items():
            bar.set_description(f"probes of {fact}")
            found.append(_probe_fact(fact, labels, pixels, features, seed))
            bar.update()
    return found


def _probe_fact(
    fact: str, labels: Sequence[str | None], pixels: np.ndarray, features: dict[str, list[np.ndarray]], seed: int
) -> Probe:
    having = np.array([k for k, label in enumerate(labels) if label is not None])
    names, classes = np.unique([labels[k] for k in having], return_inverse=True)
    parts = split(classes, seed)

    def score(inputs: np.ndarray) -> float:
        return accuracy(inputs[having], classes, parts)

    return Probe(
        fact=fact,
        n_classes=len(names),
        n_train=len(parts[0]) + len(parts[1]),
        n_test=len(parts[2]),
        commonest=float(np.bincount(classes[parts[2]]).max() / len(parts[2])),
        pixels=score(pixels),
        trained=tuple(score(inputs) for inputs in features["trained"]),
        untrained=tuple(score(inputs) for inputs in features["untrained"]),
    )


def split(classes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images train, validate and test: every class in all three. classes: int [n], at least 3 of each."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(classes):
        members = rng.permutation(np.nonzero(classes == label)[0])
        n_test = max(1, round(_TEST * len(members)))
        n_validation = max(1, round(_VALIDATION * len(members)))
        for part, some in zip(parts, np.split(members, [len(members) - n_test - n_validation, len(members) - n_test])):
            part.append(some)
    train, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, test


def accuracy(inputs: np.ndarray, classes: np.ndarray, parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Test accuracy of a logistic regression on inputs [n, width], its C chosen on the validation images, the strongest
    penalty of equally good ones."""
    train, validation, test = parts
    scores = [_fit(inputs[train], classes[train], c).score(inputs[validation], classes[validation]) for c in STRENGTHS]
    both = np.concatenate([train, validation])
    return float(
        _fit(inputs[both], classes[both], STRENGTHS[int(np.argmax(scores))]).score(inputs[test], classes[test])
    )


def _fit(inputs: np.ndarray, classes: np.ndarray, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        # A probe that stops early is a probe all the same: it is judged by its accuracy, like the others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)).fit(inputs, classes)


def as_dict(model: Model, data: Labelled, probes: Sequence[Probe]) -> dict[str, Any]:
    return {
        "model": model.name,
        "data": data.name,
        "n": len(data.pixels),
        "probes": [asdict(each) for each in probes],
    }


def table(probes: Sequence[Probe]) -> str:
    """Markdown, in percent: a row for each layer, a column for each fact, untrained in brackets."""
    lines = [
        "| accuracy, % (untrained) | " + " | ".join(each.fact for each in probes) + " |",
        "|---|" + "---|" * len(probes),
    ]
    for depth in range(len(probes[0].trained)):
        cells = [f"{100 * each.trained[depth]:.1f} ({100 * each.untrained[depth]:.1f})" for each in probes]
        lines.append(f"| layer {depth} | {' | '.join(cells)} |")
    lines.append(f"| raw pixels | {' | '.join(f'{100 * each.pixels:.1f}' for each in probes)} |")
    lines.append(f"| commonest class | {' | '.join(f'{100 * each.commonest:.1f}' for each in probes)} |")
    lines.append(f"| classes | {' | '.join(str(each.n_classes) for each in probes)} |")
    lines.append(f"| images to fit, to test | {' | '.join(f'{p.n_train}, {p.n_test}' for p in probes)} |")
    return "\n".join(lines)


def plot(path: Path, probes: Sequence[Probe]) -> None:
    """Accuracy by layer, a panel for each fact: trained, untrained, raw pixels, commonest class."""
    from matplotlib.figure import Figure

    columns = min(4, len(probes))
    rows = -(-len(probes) // columns)
    figure = Figure(figsize=(1.2 + 3 * columns, 1.2 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel in panels.flat[len(probes) :]:
        panel.set_visible(False)
    for panel, each in zip(panels.flat, probes):
        depths = range(len(each.trained))
        panel.plot(depths, each.trained, "o-", color="C0", label="trained")
        panel.plot(depths, each.untrained, "o-", color="C1", label="untrained")
        panel.axhline(each.pixels, color="C2", linestyle="--", label="raw pixels")
        panel.axhline(each.commonest, color="0.6", linestyle=":", label="commonest class")
        panel.set(title=each.fact, xlabel="layer", ylabel="accuracy", ylim=(0, 1.03), xticks=_ticks(len(depths)))
    panels.flat[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _ticks(count: int) -> range:
    return range(0, count, max(1, count // 8))
