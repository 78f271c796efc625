"""Language models of RWKV 4 to 7."""

import keras
from keras import ops, tree

from keras_seq import initializers
from keras_seq.base import autocast, call_layer, cast, own_arguments
from keras_seq.checkpoints import rwkv as official
from keras_seq.checkpoints.files import read_arrays, write_arrays
from keras_seq.layers import RWKVBlock
from keras_seq.layers.dense import matrix, project
from keras_seq.layers.prepared import norm_of, products
from keras_seq.models.language_model import LanguageModel
from keras_seq.models.transformer_parts import checkpointed
from keras_seq.ops.scan import compiles, scan

VERSIONS = (4, 5, "5.0", "5.1", "5.2", 6, 7)


@keras.saving.register_keras_serializable("keras_seq")
class RWKV(LanguageModel):
    """A language model of RWKV 4, 5, 6 or 7, with the initial values of the official training code.

    `x = ln0(E[token])`; `x = block(x)` for each block; `logits = ln_out(x) W`.

    It is trained on whole sequences at once, and generates with a state of constant size.

    Args:
        vocab_size: number of token ids; 65536 in the World models.
        d_model: size of the embeddings.
        num_layers: number of blocks.
        version: 4, 5, 6 or 7; of 5 also the older revisions `"5.0"` and `"5.1"`.
        head_dim: size of a head, from version 5 on; it divides `d_model`.
        hidden_dim: size inside the channel mixing; default that of the version.
        l2_wrap: in training, without a loss in `compile`, this much of half the mean square of the largest logit of
            each token is added to the loss, to its gradient only: the loss that is shown is the cross-entropy.
            Official: 1e-4.
        state_tuning: whether the initial states S are the only weights that `fit` trains (versions 5 to 7). At first
            they are 0.
        checkpoint: whether `fit` computes each block a second time in the backward pass instead of keeping what is
            inside it: less memory, about a third more time.
        scan_layers: whether `fit` runs the blocks after the first as one loop over their weights side by side, so that
            TensorFlow and JAX compile one of them and not each: for models of many blocks. It takes a copy of the
            weights, and on TensorFlow the time of `checkpoint`. PyTorch compiles nothing.
        pad_id: the token id that is padding, or None. In official models 0 is the end of a text, not padding: there
            it is None.
        **kwargs: for the time mixing, as in `RWKVBlock`: `mix_rank` (6), `decay_rank` (6, 7), `iclr_rank`,
            `value_rank`, `gate_rank`, `allow_negative_eigenvalues` (7); and `stateful` and those of `keras.Model`.

    Call: tokens `(b, t)`, mask `(b, t)` bool or None -> logits `(b, t, vocab_size)`. The state is the tuple of the
    blocks' states: `((last input of the time mixing (b, d), S (b, h, n, n)), last input of the channel mixing (b, d))`,
    with three sums `(b, d)` in place of S in version 4.

    Raises: ValueError for an unknown version, sizes < 1, a `head_dim` that does not divide `d_model`.

    Source: Peng et al. 2023, arXiv:2305.13048 (4); 2024, arXiv:2404.05892 (5, 6); 2025, arXiv:2503.14456 (7).

    Example:

        model = keras_seq.models.RWKV(100, d_model=32, num_layers=2, head_dim=16)
        model.compile("adam")
        model.fit(np.random.randint(1, 100, (64, 20)), verbose=0)
        tokens = model.generate([5, 7], max_new_tokens=10, temperature=0.8, seed=0)
    """

    def __init__(
        self,
        vocab_size,
        d_model,
        num_layers,
        version=7,
        head_dim=64,
        hidden_dim=None,
        l2_wrap=1e-4,
        state_tuning=False,
        checkpoint=False,
        scan_layers=False,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(vocab_size, pad_id, **own_arguments(kwargs))
        if version not in VERSIONS or not isinstance(version, int | str):
            raise ValueError(f"`version` must be one of {VERSIONS}. Received: version={version!r}")
        for name, size in {"d_model": d_model, "num_layers": num_layers}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size!r}")
        if kwargs.get("revision", version) != version:
            raise ValueError(f"`revision` is part of `version`. Received: {version=}, revision={kwargs['revision']!r}")
        if not isinstance(l2_wrap, int | float) or l2_wrap < 0:
            raise ValueError(f"`l2_wrap` must be a number from 0 on. Received: l2_wrap={l2_wrap!r}")
        self.version = int(version[0]) if isinstance(version, str) else version
        if state_tuning and self.stateful:
            raise ValueError(
                "`state_tuning` trains the state before the first token, which `stateful` carries on from."
            )
        if state_tuning and self.version == 4:
            raise ValueError("`state_tuning` is for versions 5 to 7, whose state is a matrix. Received: version=4")
        if self.version != 4 and (head_dim < 1 or d_model % head_dim):
            raise ValueError(f"`head_dim` must divide d_model={d_model}. Received: head_dim={head_dim!r}")
        self.d_model, self.num_layers, self.head_dim = d_model, num_layers, head_dim
        self.l2_wrap, self.state_tuning = l2_wrap, state_tuning
        self.checkpoint, self.scan_layers = checkpoint, scan_layers
        kwargs |= {"revision": version} if isinstance(version, str) else {}
        kwargs |= {"trainable_state": True} if state_tuning else {}
        policy = self.dtype_policy
        self.embedding = keras.layers.Embedding(
            vocab_size, d_model, initializers.RandomUniform(-1e-4, 1e-4), dtype=policy, name="emb"
        )
        self.ln0 = keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy, name="ln0")
        self.blocks = [
            RWKVBlock(
                self.version,
                head_dim,
                hidden_dim,
                i,
                num_layers,
                dtype=policy,
                name=f"block_{i}",
                **kwargs,
            )
            for i in range(num_layers)
        ]
        self.ln_out = keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy, name="ln_out")

    def build(self, input_shape):
        shape = (*tuple(input_shape)[:2], self.d_model)
        parts = [(self.embedding, tuple(input_shape)), *((p, shape) for p in (self.ln0, *self.blocks, self.ln_out))]
        for part, its_shape in parts:
            if not part.built:
                part.build(its_shape)
                part.built = True
        if not hasattr(self, "head"):
            gain = 0.5 * max(self.vocab_size / self.d_model, 1) ** 0.5
            self.head = matrix(
                (self.d_model, self.vocab_size),
                use_bias=False,
                kernel=initializers.Orthogonal(gain),
                **self.policy_of_next(),
                name="head",
            )
        self._freeze()

    @property
    def trainable(self):
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        keras.Model.trainable.fset(self, value)
        self._freeze()

    def _freeze(self):
        """Under `state_tuning` whatever is trainable, other than the states, is not."""
        if getattr(self, "state_tuning", False):
            for weight in self.trainable_weights:
                weight.trainable = weight.name == "time_state"

    def initial_state(self, batch_size, max_length=None):
        self._built()
        return tuple(block.initial_state(batch_size) for block in self.blocks)

    def hidden(self, tokens, state, mask=None, training=False):
        x, v_first, states = call_layer(self.ln0, call_layer(self.embedding, tokens)), None, []
        apart = self.blocks[:1] if training and self._can_scan() else self.blocks
        for block, before in zip(apart, state, strict=False):

            def run(x, v_first=None, block=block, before=before):
                with autocast(block):  # also where it runs once more, in the backward pass
                    x, v_first, after = block.mix(x, before, v_first, mask, training)
                return (x, after) if v_first is None else (x, after, v_first)  # TensorFlow takes no None

            given = (x,) if v_first is None else (x, v_first)
            x, after, *value = (checkpointed(block, run) if training and self.checkpoint else run)(*given)
            v_first = value[0] if value else None
            states.append(after)
        if len(states) < len(self.blocks):
            x, others = self._scanned(x, v_first, state[1:], mask)
            states += others
        return call_layer(self.ln_out, x), tuple(states)

    def _can_scan(self):
        """Whether the blocks after the first are to be scanned, and have weights of the same kind: LoRA may differ."""
        kinds = {tuple((tuple(v.shape), v.dtype) for v in block.weights) for block in self.blocks[1:]}
        return self.scan_layers and compiles() and len(kinds) == 1

    def _scanned(self, x, v_first, states, mask):
        """The blocks after the first, in training, as a loop over their weights."""
        block, *_ = blocks = self.blocks[1:]
        same = zip(*(b.weights for b in blocks), strict=True)
        weights = [ops.stack([weight.value for weight in weights]) for weights in same]

        def step(carry, inputs):
            weights, before = inputs
            mapping = list(zip(block.weights, weights, strict=True))
            with keras.StatelessScope(state_mapping=mapping), autocast(block):
                x, v_first, after = block.mix(carry[0], before, carry[1] if len(carry) > 1 else None, mask, True)
            return (x,) if v_first is None else (x, v_first), after

        carry = (x,) if v_first is None else (x, v_first)
        states = tree.map_structure(lambda *s: ops.stack(s), *states)
        (x, *_), after = scan(step, carry, (weights, states), recompute=self.checkpoint)
        return x, [tree.map_structure(lambda a, i=i: a[i], after) for i in range(len(blocks))]

    def logits(self, h):
        return cast(project(self.head, h), self.compute_dtype)

    def stepper(self, batch_size, steps=1):
        blocks = [block.mix_stepper(batch_size, steps) for block in self.blocks]
        logits = products(self.head, rows=batch_size, steps=steps)
        if None in blocks or logits is None:
            return self.step_valid
        ln0, ln_out = norm_of(self.ln0), norm_of(self.ln_out)

        def step(token, state):
            x, v_first, states = ln0(call_layer(self.embedding, token)), None, []
            for block, before in zip(blocks, state, strict=True):
                x, v_first, after = block(x, before, v_first)
                states.append(after)
            return logits(ln_out(x)), tuple(states)

        return step

    def _token_losses(self, y, logits, training):
        losses = super()._token_losses(y, logits, training)
        if not (training and self.l2_wrap):
            return losses
        wrap = 0.5 * self.l2_wrap * ops.square(ops.max(logits, axis=-1))
        return losses + wrap - ops.stop_gradient(wrap)

    @classmethod
    def from_checkpoint(cls, path, pad_id=None, **kwargs):
        """The model of a checkpoint of any version, in the official names or, of RWKV-4, in those of Hugging Face.

        A `.pth` file is read without PyTorch, and nothing in it is executed.

        Args:
            path: a `.pth` or `.safetensors` file.
            pad_id: the token id that is padding. In official models there is none: 0 is the end of a text.
            **kwargs: more arguments of the constructor: `state_tuning`, `l2_wrap`, `checkpoint`, `dtype`, ... Version
                and sizes are told by the names and shapes in the file.

        Raises: CheckpointError for a file that is damaged, or no checkpoint of a version that is known. ValueError for
            an argument that contradicts the file.

        Example:

            model = keras_seq.models.RWKV(50, d_model=32, num_layers=2, head_dim=16)
            model.to_checkpoint("small.pth")
            same = keras_seq.models.RWKV.from_checkpoint("small.pth")
        """
        arrays = official.official_names(read_arrays(path))
        config = official.config_of(arrays, path)
        for name in config.keys() & kwargs.keys():
            same = {config[name]} | ({5} if config[name] == "5.2" else set())
            if kwargs[name] not in same:
                raise ValueError(f"{path} has {name}={config[name]!r}. Received: {name}={kwargs[name]!r}")
        with initializers.without_drawing():
            model = cls(**config | kwargs, pad_id=pad_id)
            model._built()
        official.load(model, arrays, path)
        return model

    def to_checkpoint(self, path, dtype=None):
        """Writes the weights in the official names and shapes, for the official package `rwkv` and others.

        Args:
            path: a `.pth` or `.safetensors` file. It appears, or is replaced, once all is written.
            dtype: `"float32"` (the default), `"float16"` or `"bfloat16"`.

        Raises: ValueError for a model that is quantized, has LoRA, or `allow_negative_eigenvalues`: it has no official
            form.
        """
        self._built()
        write_arrays(path, official.arrays_of(self), dtype)
