"""What the fused kernels of recurrences cannot take, on any backend."""

from keras import activations, ops


def not_fused(
    x,
    *args,
    activation=ops.tanh,
    recurrent_activation=ops.sigmoid,
    recurrent_dropout=None,
    reset_after=True,
):
    """Why a call of `simple_rnn`, `lstm` or `gru` needs the definition, or None."""
    if activation not in (ops.tanh, activations.tanh):
        return "the activation is not tanh"
    if recurrent_activation not in (ops.sigmoid, activations.sigmoid):
        return "the recurrent activation is not the sigmoid"
    if recurrent_dropout is not None:
        return "recurrent dropout"
    if not reset_after:
        return "reset_after=False"
    return None
