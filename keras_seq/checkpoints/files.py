"""Files of weights, `.pth` and `.safetensors`: `{name: array}` from them and into them."""

from pathlib import Path

from keras_seq.checkpoints.errors import CheckpointError
from keras_seq.checkpoints.pth import read_pth, write_pth
from keras_seq.checkpoints.safetensors import read_safetensors, write_safetensors

WRITERS = {".pth": write_pth, ".pt": write_pth, ".safetensors": write_safetensors}


def read_arrays(path):
    """The tensors of a file, whose format is told by how it begins, whatever its name.

    Args:
        path: a file of `torch.save` or in the safetensors format.

    Returns:
        `{name: array}`. bfloat16 has become float32.

    Raises:
        CheckpointError: the file is damaged, or something else.
        FileNotFoundError: there is no such file.

    Example:

        write_arrays("model.pth", {"emb.weight": np.ones((3, 2), "float32")})
        assert read_arrays("model.pth")["emb.weight"].shape == (3, 2)
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return read_safetensors(path)
    if start.startswith((b"PK\3\4", b"\x80\2")):
        return read_pth(path)
    raise CheckpointError(
        f"Expected a file of torch.save or in the safetensors format as {str(path)!r}. Received: one that begins with "
        f"{start!r}"
    )


def write_arrays(path, arrays, dtype=None):
    """Writes a file in the format that its name ends in.

    Args:
        path: the file, named `*.pth`, `*.pt` or `*.safetensors`. It appears, or is replaced, once all is written.
        arrays: `{name: array}`.
        dtype: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"` for all floating-point arrays; None keeps each as
            it is.

    Raises:
        CheckpointError: the name ends otherwise, or the format cannot hold the arrays.

    Example:

        write_arrays("model.safetensors", {"emb.weight": np.ones((3, 2), "float32")}, dtype="float16")
    """
    write = WRITERS.get(Path(path).suffix)
    if write is None:
        names = ", ".join(f"*{end}" for end in WRITERS)
        raise CheckpointError(f"Expected a file named {names}. Received: {str(path)!r}")
    write(path, arrays, dtype)
