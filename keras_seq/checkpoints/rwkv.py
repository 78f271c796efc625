"""The names and shapes of official checkpoints of RWKV.

`blocks.0.att.key.weight` is a matrix `(out, in)`, transposed here; vectors are `(1, 1, d)` or `(d,)` and matrices of
adapters stand as they are. Weights of this library have the official names.
"""

import re

import numpy as np

from keras_seq.checkpoints.errors import CheckpointError
from keras_seq.progress import progress

_HUGGING_FACE = (  # of RWKV-4
    (r"^rwkv\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"time_mix_(k|v|r)\w+$", r"time_mix_\1"),
)


def official_names(arrays):
    """The arrays by their official names, if they have those of Hugging Face."""

    def renamed(name):
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        return name

    return {renamed(name): array for name, array in arrays.items()}


def config_of(arrays, path):
    """Arguments of `RWKV`, from the names and shapes in a checkpoint.

    Raises: CheckpointError if it is of no version that is known, or has sizes that no model has.
    """
    config = _config_of(arrays, path)
    wrong = {name: size for name, size in config.items() if isinstance(size, int) and size < 1}
    if not wrong and config["d_model"] % config.get("head_dim", 1):
        wrong = {name: config[name] for name in ("d_model", "head_dim")}
    if wrong:
        sizes = ", ".join(f"{name}={size}" for name, size in wrong.items())
        raise CheckpointError(f"{path}: expected sizes from 1 on, and heads that divide d_model. Received: {sizes}")
    return config


def _config_of(arrays, path):
    shape = {name: array.shape for name, array in arrays.items()}
    blocks = {int(found[1]) for name in shape if (found := re.match(r"blocks\.(\d+)\.", name))}
    needed = ("emb.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight")
    missing = [name for name in needed if len(shape.get(name, ())) != 2]
    if missing or blocks != set(range(len(blocks))):
        raise CheckpointError(
            f"{path}: no checkpoint of RWKV. Expected matrices {', '.join(needed)} and blocks from 0 on. "
            f"Received: blocks {sorted(blocks)[:8]}, without {', '.join(missing) or 'any missing'}; "
            f"names such as {', '.join(list(shape)[:4])}"
        )
    vocab_size, d_model = shape["emb.weight"]
    att = {name.removeprefix("blocks.0.att."): s for name, s in shape.items() if name.startswith("blocks.0.att.")}
    config = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": len(blocks)}
    config["hidden_dim"] = shape["blocks.0.ffn.key.weight"][0]
    if "blocks.0.ffn.s_emb.weight" in shape or any("qkv" in name or "rosa" in name for name in shape):
        raise CheckpointError(f"{path}: a later variant of RWKV-7, or RWKV-8. Expected version 4, 5, 6 or 7.")
    config |= {"trainable_state": True} if "time_state" in att else {}

    def last(name):
        """The last size of a weight of the first block; 0 if it has none, or is not there."""
        return (0, *att.get(name, ()))[-1]

    if "r_k" in att:
        config |= {"version": 7, "head_dim": last("r_k")}
        ranks = {"decay_rank": "w1", "iclr_rank": "a1", "gate_rank": "g1"}
        config |= {rank: last(name) for rank, name in ranks.items()}
        later = shape.get("blocks.1.att.v1")
        return config | ({"value_rank": later[-1]} if later else {})
    if "time_maa_w1" in att and "time_decay_w1" in att:
        ranks = {"mix_rank": last("time_maa_w1") // 5, "decay_rank": last("time_decay_w1")}
        return config | {"version": 6, "head_dim": last("time_faaaa")} | ranks
    if "ln_x.weight" in att and "time_decay" in att:
        decay = att["time_decay"]
        if len(decay) == 2 and decay[1] > 1:
            return config | {"version": "5.2", "head_dim": decay[1]}
        heads = (0, *decay)[min(len(decay), 1)]
        head_dim = d_model // heads if heads else 0
        return config | {"version": "5.1" if "gate.weight" in att else "5.0", "head_dim": head_dim}
    if "time_first" in att:
        return config | {"version": 4}
    raise CheckpointError(
        f"{path}: expected RWKV of version 4, 5, 6 or 7. Received in the first block: {', '.join(list(att)[:12])}"
    )


def variables_of(model):
    """`{official name: (variable, to_official, from_official)}` of a built RWKV: functions of NumPy arrays."""
    found = {}

    def add(name, variable, official=np.asarray, ours=np.asarray):
        found[name] = variable, official, ours

    def norm(name, layer):
        add(f"{name}.weight", layer.gamma)
        add(f"{name}.bias", layer.beta)

    def matrix(name, layer):
        _check_plain(layer)
        add(f"{name}.weight", layer.kernel, np.transpose, np.transpose)

    _check_plain(model.embedding)
    add("emb.weight", model.embedding.embeddings)
    norm("blocks.0.ln0", model.ln0)
    for i, block in enumerate(model.blocks):
        norm(f"blocks.{i}.ln1", block.ln1)
        norm(f"blocks.{i}.ln2", block.ln2)
        for part, layer in (("att", block.time_mixing), ("ffn", block.channel_mixing)):
            for dense in layer._layers:
                matrix(f"blocks.{i}.{part}.{dense.name}", dense)
            for weight in layer._trainable_variables + layer._non_trainable_variables:
                name = weight.name.replace("ln_x_", "ln_x.")
                add(f"blocks.{i}.{part}.{name}", weight, *_shapes(name, weight.shape, block.version))
    norm("ln_out", model.ln_out)
    matrix("head", model.head)
    return found


def _check_plain(layer):
    if layer.quantization_mode or layer.lora_enabled:
        raise ValueError(f"{layer.path} is quantized or has LoRA: there is no official form of it.")


def _shapes(name, shape, version):
    """To and from the official shape of a weight that is no matrix of a projection."""
    if name == "time_state" and version != 7:
        return (lambda x: np.swapaxes(x, 1, 2),) * 2
    official = shape
    if re.match(r"time_mix_|time_maa_.$|x_|k_|[wav]0$", name) or (name == "time_decay" and version == 6):
        official = (1, 1, *shape)
    elif version == 5 and shape[-1] == 1:
        official = shape[:1]
    return lambda x: x.reshape(official), lambda x: x.reshape(shape)


def load(model, arrays, path):
    """Gives a built RWKV the weights of a checkpoint: all of them, or none if one is missing or of another shape.

    Raises: CheckpointError that names what is missing, superfluous or of a wrong shape.
    """
    variables = variables_of(model)
    ignored = {f"blocks.0.att.v{i}" for i in range(3)} if model.version == 7 else set()
    optional = {name for name in variables if name.endswith("time_state")}
    wrong = [f"{name} is missing" for name in variables if name not in arrays and name not in optional]
    wrong += [f"{name} is not known" for name in arrays if name not in variables and name not in ignored]
    values = {}
    for name, (variable, official, ours) in variables.items():
        if name not in arrays:
            continue
        expected = official(np.broadcast_to(np.float32(0), variable.shape)).shape
        if _without_ones(arrays[name].shape) != _without_ones(expected):
            wrong.append(f"{name} has shape {arrays[name].shape}, expected {expected}")
        elif arrays[name].dtype.kind != "f":
            wrong.append(f"{name} is of {arrays[name].dtype}, expected floats")
        else:
            values[name] = variable, ours(arrays[name].reshape(expected))
    if wrong:
        more = f", and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"{path}: no checkpoint of this model: {'; '.join(wrong[:6])}{more}")
    for variable, value in progress(values.values(), f"setting the weights of {path}"):
        variable.assign(value)


def _without_ones(shape):
    return tuple(n for n in shape if n != 1)


def arrays_of(model):
    """The weights of a built RWKV by their official names.

    Raises: ValueError for a model that has no official form.
    """
    if model.version == 7 and any(block.time_mixing.allow_negative_eigenvalues for block in model.blocks):
        raise ValueError("The official form has no place for `allow_negative_eigenvalues`: save the model with `save`.")
    return {
        name: np.ascontiguousarray(official(np.asarray(variable.numpy(), "float32")))
        for name, (variable, official, _) in progress(variables_of(model).items(), "reading the weights of the model")
    }
