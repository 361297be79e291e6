"""The losses once more: dense, in numpy and float64, from their formulas, with the gradients worked out by hand."""

import numpy as np


def dense_sigmoid(x_NE, y_CME, tau, b, *, divisor=None, weights=None, first=0):
    """Return the five values by name, the gradients of x, y, τ and b, and the sizes of their terms."""
    captions, batch, _ = y_CME.shape
    w_C11 = np.ones((captions, 1, 1)) if weights is None else np.reshape(weights, (-1, 1, 1))
    divisor = divisor or batch**2
    s_CNM, own_NM = np.exp(tau) * x_NE @ y_CME.transpose(0, 2, 1), own(len(x_NE), batch, first)
    logit_CNM = s_CNM + b
    z_NM = np.where(own_NM, 1, -1)
    total = (w_C11 * np.logaddexp(0, -z_NM * logit_CNM)).sum() / divisor
    g_CNM = -z_NM * w_C11 / (1 + np.exp(np.clip(z_NM * logit_CNM, -700, 700))) / divisor
    terms = (x_NE, y_CME, tau, s_CNM, g_CNM)
    return {"total": total, **health(logit_CNM, g_CNM, own_NM)}, gradients(*terms), sizes(*terms)


def dense_infonce(x_NE, y_CME, tau, b, *, weights=None):
    """Return the same of InfoNCE, for a whole batch."""
    batch = len(x_NE)
    w_C11 = np.ones((len(y_CME), 1, 1)) if weights is None else np.reshape(weights, (-1, 1, 1))
    s_CNM, own_NM = np.exp(tau) * x_NE @ y_CME.transpose(0, 2, 1), own(batch, batch, 0)
    log_p = [s_CNM - np.logaddexp.reduce(s_CNM, axis=axis, keepdims=True) for axis in (1, 2)]
    total = -(w_C11 * own_NM * (log_p[0] + log_p[1])).sum() / 2 / batch
    g_CNM = w_C11 * ((np.exp(log_p[0]) + np.exp(log_p[1])) / 2 - own_NM) / batch
    terms = (x_NE, y_CME, tau, s_CNM, g_CNM)
    return {"total": total, **health(s_CNM, g_CNM, own_NM)}, gradients(*terms), sizes(*terms)


def own(images, batch, first):
    """Return (N, M) bool: which text belongs with which image."""
    return np.arange(images)[:, None] + first == np.arange(batch)


def health(logit_CNM, g_CNM, own_NM):
    """Return the mean logits, as shares of a batch of M pairs, and the masses."""
    captions, _, batch = logit_CNM.shape
    return {
        "positive_logit": (logit_CNM * own_NM).sum() / (captions * batch),
        "negative_logit": (logit_CNM * ~own_NM).sum() / (captions * batch * (batch - 1)),
        "positive_mass": np.abs(g_CNM * own_NM).sum(),
        "negative_mass": np.abs(g_CNM * ~own_NM).sum(),
    }


def gradients(x_NE, y_CME, tau, s_CNM, g_CNM):
    """Return the gradients of x, y, τ and b from those of the logits."""
    t = np.exp(tau)
    return t * (g_CNM @ y_CME).sum(0), t * g_CNM.transpose(0, 2, 1) @ x_NE, (g_CNM * s_CNM).sum(), g_CNM.sum()


def sizes(x_NE, y_CME, tau, s_CNM, g_CNM):
    """Return what the gradients would be if none of their terms cancelled: rounding is relative to that."""
    return gradients(np.abs(x_NE), np.abs(y_CME), tau, np.abs(s_CNM), np.abs(g_CNM))
