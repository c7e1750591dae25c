"""Temperature scaling (Guo et al., 2017): one number per member that calibrates its confidences.

The temperature divides the weights of the last layer before the export, so the graph answers calibrated logits by
itself and no answer's label changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cascade_train.finetune import last_linear
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

_RANGE = (0.05, 20.0)


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.intp]) -> float:
    """Return the temperature T that minimises the mean negative log-likelihood of softmax(logits / T).

    `logits`: (texts, labels), of texts that the member did not learn; `labels`: class ids, (texts,).
    """
    rows = np.arange(len(labels))
    found = minimize_scalar(
        lambda log_t: -float(np.mean(log_softmax(logits / np.exp(log_t), axis=1)[rows, labels])),
        bounds=tuple(np.log(_RANGE)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))


def divide_logits(model: Any, temperature: float) -> None:
    """Divide a classifier's logits by `temperature`, in its last layer's weights; raises CascadeError without one."""
    with torch.no_grad():
        for weights in last_linear(model).parameters():
            weights.div_(temperature)
