"""The losses once more: dense, in numpy and float64, from their formulas, with the gradients worked out by hand."""

import numpy as np


def dense_sigmoid(x_ME, y_CNE, tau, b, *, divisor=None, weights=None):
    """Return the five values by name, the gradients of x, y, τ and b, and the sizes of their terms."""
    batch, captions = len(x_ME), len(y_CNE)
    w_C11 = np.ones((captions, 1, 1)) if weights is None else np.reshape(weights, (-1, 1, 1))
    divisor = divisor or batch**2
    s_CMN, own_MN = np.exp(tau) * x_ME @ y_CNE.transpose(0, 2, 1), own(batch, y_CNE.shape[1])
    logit_CMN = s_CMN + b
    z_MN = np.where(own_MN, 1, -1)
    total = (w_C11 * np.logaddexp(0, -z_MN * logit_CMN)).sum() / divisor
    g_CMN = -z_MN * w_C11 / (1 + np.exp(np.clip(z_MN * logit_CMN, -700, 700))) / divisor
    terms = (x_ME, y_CNE, tau, s_CMN, g_CMN)
    return {"total": total, **health(logit_CMN, g_CMN, own_MN)}, gradients(*terms), sizes(*terms)


def dense_infonce(x_ME, y_CNE, tau, b, *, weights=None):
    """Return the same of InfoNCE, for a whole batch."""
    batch = len(x_ME)
    w_C11 = np.ones((len(y_CNE), 1, 1)) if weights is None else np.reshape(weights, (-1, 1, 1))
    s_CMN, own_MN = np.exp(tau) * x_ME @ y_CNE.transpose(0, 2, 1), own(batch, batch)
    log_p = [s_CMN - np.logaddexp.reduce(s_CMN, axis=axis, keepdims=True) for axis in (1, 2)]
    total = -(w_C11 * own_MN * (log_p[0] + log_p[1])).sum() / 2 / batch
    g_CMN = w_C11 * ((np.exp(log_p[0]) + np.exp(log_p[1])) / 2 - own_MN) / batch
    terms = (x_ME, y_CNE, tau, s_CMN, g_CMN)
    return {"total": total, **health(s_CMN, g_CMN, own_MN)}, gradients(*terms), sizes(*terms)


def own(batch, texts):
    """Return (M, N) bool: which text belongs with which image."""
    return np.arange(batch)[:, None] == np.arange(texts)


def health(logit_CMN, g_CMN, own_MN):
    """Return the mean logits, as shares of a batch of M pairs, and the masses."""
    captions, batch, _ = logit_CMN.shape
    return {
        "positive_logit": (logit_CMN * own_MN).sum() / (captions * batch),
        "negative_logit": (logit_CMN * ~own_MN).sum() / (captions * batch * (batch - 1)),
        "positive_mass": np.abs(g_CMN * own_MN).sum(),
        "negative_mass": np.abs(g_CMN * ~own_MN).sum(),
    }


def gradients(x_ME, y_CNE, tau, s_CMN, g_CMN):
    """Return the gradients of x, y, τ and b from those of the logits."""
    t = np.exp(tau)
    return t * (g_CMN @ y_CNE).sum(0), t * g_CMN.transpose(0, 2, 1) @ x_ME, (g_CMN * s_CMN).sum(), g_CMN.sum()


def sizes(x_ME, y_CNE, tau, s_CMN, g_CMN):
    """Return what the gradients would be if none of their terms cancelled: rounding is relative to that."""
    return gradients(np.abs(x_ME), np.abs(y_CNE), tau, np.abs(s_CMN), np.abs(g_CMN))
