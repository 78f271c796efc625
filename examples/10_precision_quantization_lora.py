r"""
# Mixed precision, quantization, LoRA

Three ways to make a model cheaper. Mixed precision computes in 16 bits. Quantization stores the matrices of a trained
model in 8 or 4 bits. LoRA adapts a model by a few small matrices. Here is what each gives, in bytes and in bits per
character, for a small Transformer; the other models of this library work the same way.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import argparse
import math
import pathlib

import keras
import numpy as np
from keras import ops
from shared import bits_per_character, python_documentation, windows

import keras_seq
from keras_seq import layers, models

keras.utils.set_random_seed(0)

r"""
## Numbers of few bits

A floating-point number is \(\pm m \cdot 2^e\). Its bits are shared between the exponent \(e\), which gives the range,
and the fraction \(m\), which gives the precision.

| | bytes | bits of exponent and fraction | step above 1 | largest |
|---|---|---|---|---|
| float32 | 4 | 8, 23 | \(1.2 \cdot 10^{-7}\) | \(3.4 \cdot 10^{38}\) |
| bfloat16 | 2 | 8, 7 | \(7.8 \cdot 10^{-3}\) | \(3.4 \cdot 10^{38}\) |
| float16 | 2 | 5, 10 | \(9.8 \cdot 10^{-4}\) | 65504 |
| int8 | 1 | none: whole numbers | 1 | 127 |
| int4 | 1/2 | none: whole numbers | 1 | 7 |

bfloat16 has the range of float32, and two to three decimal digits. That is enough to multiply; it is not enough to add
up. Add 0.01 a thousand times: at 4 the step from one number to the next is \(2^{-5} = 0.031\), and 0.01 is less than
half of it. The sum is rounded back to 4, again and again. Before, each step was rounded up or down.
"""

ADDED = 1000
sums = {}
for dtype in ("float32", "bfloat16"):
    total, values = ops.cast(0.0, dtype), []
    for _ in range(ADDED):
        total = total + ops.cast(0.01, dtype)
        values.append(float(ops.convert_to_numpy(ops.cast(total, "float32"))))
    sums[dtype] = values
print({dtype: round(values[-1], 2) for dtype, values in sums.items()})
figure = keras_seq.plotting.curves(sums, "numbers added", "sum", "0.01, added a thousand times")

r"""
## What stays in float32

The state of a recurrent layer is such a sum. Under the dtype policy `"mixed_bfloat16"` weights are kept in float32 and
layers compute in bfloat16; the layers of this library keep the state in float32 all the same, and so softmax, norms and
positions. An LSTM can show it. Set by hand, with all gates open and \(\tanh(x_t)\) to be written, its memory is
\(c_t = c_{t-1} + \tanh(x_t)\): the sum from above. `keras.layers.LSTM` keeps its memory in the compute dtype.
"""

x = np.full((1, ADDED, 1), 0.01, "float32")
gates = [np.array([[0, 0, 1, 0]]), np.zeros((1, 4)), np.array([100, 100, 0, 100])]  # input, forget, memory, output
memory = {}
for name, cls in {"keras_seq": layers.LSTM, "keras": keras.layers.LSTM}.items():
    lstm = cls(1, return_state=True, dtype="mixed_bfloat16")
    lstm.build((None, None, 1))
    lstm.set_weights(gates)
    _, _, c = keras.tree.flatten(lstm(x))
    memory[name] = float(ops.convert_to_numpy(ops.cast(c, "float32")).item())
    print(f"{name}.layers.LSTM: the memory is {memory[name]:.2f}, in {keras.backend.standardize_dtype(c.dtype)}")
assert abs(memory["keras_seq"] - ADDED * math.tanh(0.01)) < 0.02

"""
## Mixed precision

A policy goes into a model as `dtype`, and reaches all its layers. `keras.config.set_dtype_policy("mixed_bfloat16")`
sets it for all models that are made afterwards. Here is the same small Transformer trained twice, on the documentation
of the Python language, a character a token. Time is gained only on processors with units for bfloat16, such as recent
GPUs; many CPUs are slower with it. Memory is gained everywhere: what layers hand on, and keep for the backward pass,
has half the bytes.
"""

CHARACTERS = None  # all
D_MODEL = 128
LAYERS = 2
LENGTH = 64
BATCH = 16

alphabet, training, held_out = python_documentation(CHARACTERS)


def batches(tokens):
    """Pieces in whole batches: another size would be compiled, too."""
    pieces = windows(tokens, LENGTH)
    return pieces[: len(pieces) // BATCH * BATCH]


documentation = batches(held_out)


def transformer(dtype):
    keras.utils.set_random_seed(0)
    return models.TransformerLM(
        len(alphabet), D_MODEL, LAYERS, 4, position="rotary", tie_embeddings=False, pad_id=None, dtype=dtype
    )


def bytes_of(model):
    return sum(ops.convert_to_numpy(weight).nbytes for weight in model.weights)


POLICIES = ("mixed_bfloat16", "float32")
bits = {}
for dtype in POLICIES:
    model = transformer(dtype)
    model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0))
    model.fit(batches(training), batch_size=BATCH, verbose=0)
    bits[dtype] = bits_per_character(model, documentation)
    computes = keras.backend.standardize_dtype(model(documentation[:1]).dtype)
    stored = {keras.backend.standardize_dtype(weight.dtype) for weight in model.trainable_weights}
    print(f"{dtype:15} logits in {computes:8}, weights in {stored}: {bits[dtype]:.3f} bits per character")

r"""
The two come out alike: rounding in the products does little harm, as long as the sums are not rounded.

## Quantization

A trained matrix can be stored in whole numbers: each column \(w\) as \(q = \mathrm{round}(w / s)\), with a scale \(s\)
that makes the largest number 127. In use \(s\,q\) takes the place of \(w\). That is int8; the inputs of the matrix are
rounded in the same way, so that whole numbers are multiplied. int4 has 16 levels only: in Keras each 128 numbers of a
column have a scale of their own, and inputs stay as they are.

`model.quantize` does this in place, so here it gets a copy from a file. It reaches all matrices of this model: they are
in `Dense`, `EinsumDense` and `Embedding` layers. `filters` keeps it from warning of layers that it has nothing to do
with.
"""

model.save("float32.keras")


def has_a_matrix(layer):
    return isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding)


MODES = ("int8", "int4")
sizes = {"float32": bytes_of(model)}
for mode in MODES:
    quantized = keras.models.load_model("float32.keras", compile=False)  # without the optimizer: to use, not to train
    quantized.quantize(mode, filters=has_a_matrix)
    quantized.compile()
    sizes[mode], bits[mode] = bytes_of(quantized), bits_per_character(quantized, documentation)
    quantized.save(f"{mode}.keras")

for name, size in sizes.items():
    print(f"{name:8}{size:10,} bytes, {size / sizes['float32']:4.0%}   {bits[name]:.3f} bits per character")

"""
A quantized model is saved, loaded and used as any other.
"""

again = keras.models.load_model("int4.keras", compile=False)
prompt = [alphabet.index(c) for c in "The "]
tokens = again.generate(prompt, 60, temperature=0.7, seed=0)
assert np.array_equal(tokens, quantized.generate(prompt, 60, temperature=0.7, seed=0))
print("The " + "".join(alphabet[token] for token in tokens))

r"""
## LoRA

To adapt a model to another text one can train all its weights. LoRA (Hu et al., 2021) leaves a matrix \(W\) as it is
and adds a product of two narrow ones, \(W + A B\), where \(A\) has `rank` columns and \(B\) as many rows. \(B\) begins
at 0, so nothing changes at first. Only \(A\) and \(B\) are trained.

`enable_lora(rank)` of Keras does this for one layer. The matrices of a block have names. Keras leaves biases and norms
trainable, so the last line stops them.
"""

RANK = 4


def add_lora(model, rank):
    for block in model.blocks:
        attention, network = block.attention, block.feedforward
        for layer in (attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense):
            layer.enable_lora(rank)
        for layer in (network.hidden_dense, network.output_dense):
            layer.enable_lora(rank)
    for weight in model.weights:
        weight.trainable = "lora" in weight.name


adapted = keras.models.load_model("float32.keras", compile=False)
before = ops.convert_to_numpy(adapted(documentation[:1]))
add_lora(adapted, RANK)
assert np.allclose(ops.convert_to_numpy(adapted(documentation[:1])), before, atol=1e-5)

"""
The other text is Python itself: the source of the module `argparse`. For comparison all weights of a second copy are
trained for as long. Both are then asked for the new text and for the old one, which a model may forget.
"""

EPOCHS = 2
SOURCE_CHARACTERS = None  # all
source = pathlib.Path(argparse.__file__).read_text(encoding="utf-8")[:SOURCE_CHARACTERS]
source = np.array([alphabet.index(c) for c in source if c in alphabet], "int32")
split = len(source) * 9 // 10
source, new_source = batches(source[:split]), batches(source[split:])

everything = keras.models.load_model("float32.keras", compile=False)
rows = [("as it was", 0, bits_per_character(model, new_source), bits["float32"])]
for name, each, rate in (("LoRA", adapted, 1e-2), ("all weights", everything, 2e-3)):
    each.compile(keras.optimizers.Adam(rate, clipnorm=1.0))
    each.fit(source, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    trained = sum(math.prod(weight.shape) for weight in each.trainable_weights)
    rows.append((name, trained, bits_per_character(each, new_source), bits_per_character(each, documentation)))

print(f"{'':14}{'trained':>9}{'source':>9}{'documentation':>15}   (weights; bits per character)")
for name, trained, new, old in rows:
    print(f"{name:14}{trained:9,}{new:9.3f}{old:15.3f}")

r"""
LoRA has learned most of what all weights learn, with a seventeenth of them, and has forgotten less. Adam keeps two more
numbers for each weight that it trains: LoRA saves most of that memory, too. A file holds the sum \(W + A B\): what
loads is a plain model, as fast as before.
"""

adapted.save("adapted.keras")
plain = keras.models.load_model("adapted.keras", compile=False)
print(f"{len(adapted.weights)} weights with LoRA, {len(plain.weights)} after loading")
expected = ops.convert_to_numpy(adapted(documentation[:1]))
assert np.allclose(ops.convert_to_numpy(plain(documentation[:1])), expected, atol=1e-4)

"""
## What can go wrong

- **float16 gives NaN or a loss that stands still.** Its range is small: small gradients become 0. Under
  `"mixed_float16"` `compile` wraps the optimizer in one that scales the loss; a training loop of your own has to do it
  itself. bfloat16 needs none of this.
- **The policy has no effect.** It is read when a layer is made. Set the global policy before you make the model, or
  pass `dtype`. A global policy stays set for all that follows: `keras.config.set_dtype_policy("float32")` resets it.
- **An LSTM hardly shrinks.** `quantize` and LoRA reach `Dense`, `EinsumDense` and `Embedding`. `LSTM`, `GRU` and
  `SimpleRNN` hold their matrices themselves: of a `RecurrentLM` only embedding and logits get smaller.
- **The file is larger than the weights.** It holds the optimizer as well. Load with `compile=False` and save again.
- **A quantized model does not train.** Whole numbers have no gradient: its kernels are not trainable. Quantize last.
- **LoRA after `quantize` changes a little in the file.** Saving rounds the sum into the few bits again.
- **`to_checkpoint` of RWKV refuses** a model that is quantized or has LoRA: the official format has no place for
  either. After LoRA, save and load once; then it is plain.
"""
