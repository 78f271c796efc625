"""Generated tokens against a loop that calls the model on the growing sequence."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import decoding
from keras_seq.decoding import engine
from keras_seq.models import RWKV, RecurrentLM, TransformerLM

V = 11
N = 7  # no power of two
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]


def random_weights(model, seed):
    """Large ones, so that the tokens differ from step to step and from row to row."""
    rng = np.random.default_rng(seed)
    model.set_weights([(1.5 * rng.normal(size=w.shape)).astype("float32") for w in model.weights])
    return model


def make_model(seed=49, **kwargs):
    model = RecurrentLM(V, 8, cell="gru", **kwargs)
    model.build((None, None))
    return random_weights(model, seed)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def plain():
    """A model without padding."""
    return make_model(pad_id=None)


@pytest.fixture(scope="module")
def greedy(model):
    """The greedy tokens of `PROMPTS` by hand."""
    tokens = np.array([by_hand(model, prompt) for prompt in PROMPTS])
    assert all(len(set(row)) > 3 for row in tokens.tolist())  # or the tests below would not see much
    return tokens


def by_hand(model, prompt, n=N):
    """Reads the growing sequence anew for each token. What fills it up to one size comes later, and so counts not."""
    tokens = list(prompt)
    for _ in range(n):
        sequence = np.array([[*tokens, *(1,) * (4 + N - len(tokens))]], "int32")
        logits = ops.convert_to_numpy(model(sequence))[0, len(tokens) - 1].copy()
        if model.pad_id is not None:
            logits[model.pad_id] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def cut(row, stop_tokens):
    """A row up to its first stop token, filled up with 0."""
    ends = [i for i, token in enumerate(row) if token in stop_tokens]
    end = ends[0] + 1 if ends else len(row)
    return [*row[:end], *(0,) * (len(row) - end)]


def test_greedy_is_the_loop_by_hand(model, greedy):
    tokens = model.generate(PROMPTS, N)
    assert tokens.dtype == "int32"
    np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parametrize("form", ["left", "right", "holes", "mask", "out of the vocabulary", "lists with a mask"])
def test_padded_prompts(model, greedy, form):
    """However a row is padded, it gives what it alone gives."""
    left = [[0, 3, 1, 4], [0, 0, 1, 5], [9, 2, 6, 5]]
    right = [[3, 1, 4, 0], [1, 5, 0, 0], [9, 2, 6, 5]]
    holes = [[3, 0, 1, 4], [1, 0, 0, 5], [9, 2, 6, 5]]
    junk = np.where(np.array(holes), holes, 7)
    outside = np.where(np.array(right), right, -100)
    prompt, mask = {
        "left": (np.array(left), None),
        "right": (np.array(right), None),
        "holes": (np.array(holes), None),
        "mask": (junk, np.array(holes) != 0),
        "out of the vocabulary": (outside, outside >= 0),
        "lists with a mask": (junk.tolist(), (np.array(holes) != 0).tolist()),
    }[form]
    np.testing.assert_array_equal(model.generate(prompt, N, mask=mask), greedy)


def test_padding_inside_a_list(model, greedy):
    """`pad_id` is padding in a list of lists as it is in an array."""
    holes = [[3, 0, 1, 4], [1, 0, 5], [9, 2, 6, 5]]
    np.testing.assert_array_equal(model.generate(holes, N), greedy)


@pytest.mark.parametrize("form", ["list", "array", "int64", "tensor", "tuple"])
def test_one_prompt(model, greedy, form):
    prompt = PROMPTS[2]
    given = {
        "list": prompt,
        "array": np.array(prompt, "int32"),
        "int64": np.array(prompt, "int64"),
        "tensor": ops.convert_to_tensor(prompt, "int32"),
        "tuple": tuple(prompt),
    }[form]
    tokens = model.generate(given, N)
    assert tokens.shape == (N,)
    np.testing.assert_array_equal(tokens, greedy[2])


def test_a_batch_of_one_stays_a_batch(model, greedy):
    for given in (PROMPTS[2:], np.array(PROMPTS[2:]), [np.array(PROMPTS[2])]):
        np.testing.assert_array_equal(model.generate(given, N), greedy[2:])
    mask = np.array([False, True, True, True])
    np.testing.assert_array_equal(model.generate([7, 3, 1, 4], N, mask=mask), greedy[0])


@pytest.mark.parametrize("n", [1, 3, 5])
def test_number_of_tokens(model, greedy, n):
    """Fewer tokens are the first of more."""
    tokens = model.generate(PROMPTS, n)
    assert tokens.shape == (3, n)
    np.testing.assert_array_equal(tokens[:, :N], greedy[:, :n])


@pytest.mark.parametrize("arguments", [{}, {"temperature": 2.0, "top_k": 6, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", [PROMPTS, PROMPTS[2]], ids=["batch", "single"])
def test_stream_is_generate(model, prompt, arguments):
    tokens = model.generate(prompt, N, **arguments)
    stream = model.stream(prompt, N, **arguments)
    first = next(stream)
    streamed = [first, *stream]
    assert isinstance(first, int) == (tokens.ndim == 1)
    np.testing.assert_array_equal(np.stack(streamed, -1), tokens)


LONG = {
    "recurrent": lambda: make_model(),
    "attention": lambda: TransformerLM(V, 8, 1, 2, max_length=64, position="rotary"),
    "RWKV": lambda: RWKV(V, 8, 1, head_dim=4),
}


@pytest.mark.parametrize("name", LONG)
def test_long_prompts_are_read_in_pieces(name, monkeypatch):
    """Of rows of any lengths; one that ends before the last piece is read with the rest of them at once."""
    model = LONG[name]()
    model.build((None, None))
    random_weights(model, 3)
    prompt = np.random.default_rng(0).integers(1, V, (2, 11))
    left, right = np.arange(11) >= [[5], [0]], np.arange(11) < [[3], [11]]
    expected = [model.generate(prompt, 3, mask=mask) for mask in (left, right)]
    pieces = []
    monkeypatch.setattr(engine, "PIECE", 4)
    monkeypatch.setattr(engine, "progress", lambda items, what: pieces.extend(items) or items)
    np.testing.assert_array_equal(model.generate(prompt, 3, mask=left), expected[0])
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.stack(list(model.stream(prompt, 3, mask=left)), 1), expected[0])
    pieces.clear()
    np.testing.assert_array_equal(model.generate(prompt, 3, mask=right), expected[1])
    assert not pieces


def test_stream_keeps_no_gradients(model):
    """Or its memory would grow with each token."""
    seen = []

    def sampler(logits, u):
        seen.append(getattr(logits, "requires_grad", False))
        return ops.argmax(logits, axis=-1)

    list(model.stream(PROMPTS, N, sampler))
    assert len(seen) > 1
    assert not any(seen)


@pytest.mark.parametrize("stop", [(9,), (8,), (5, 6), np.array([4, 9])], ids=str)
def test_stop_tokens(model, greedy, stop):
    """A row ends after the first of them and is filled up; the others go on."""
    expected = np.array([cut(row, stop) for row in greedy.tolist()])
    ends = (expected != 0).sum(1)
    assert ends.min() < ends.max()
    np.testing.assert_array_equal(model.generate(PROMPTS, N, stop_tokens=stop), expected)
    streamed = np.stack(list(model.stream(PROMPTS, N, stop_tokens=stop)), 1)
    np.testing.assert_array_equal(streamed, expected[:, : ends.max()])


def test_stop_tokens_of_one_prompt(model, greedy):
    """The stream ends with the row; what `generate` returns keeps its length."""
    stop = [int(greedy[2, 2])]
    expected = cut(greedy[2].tolist(), stop)
    assert 0 in expected
    assert model.generate(PROMPTS[2], N, stop_tokens=stop).tolist() == expected
    assert list(model.stream(PROMPTS[2], N, stop_tokens=stop)) == [token for token in expected if token]


def test_stop_tokens_that_do_not_come(model, greedy):
    never = [t for t in range(1, V) if t not in greedy][:1]
    assert never
    np.testing.assert_array_equal(model.generate(PROMPTS, N, stop_tokens=never), greedy)


def test_seed(model):
    """The same seed gives the same tokens, another seed or none others; rows of equal prompts differ."""
    prompt = [[3, 1, 4]] * 3

    def sampled(seed):
        return model.generate(prompt, N, temperature=3.0, seed=seed)

    one = sampled(1)
    np.testing.assert_array_equal(sampled(1), one)
    assert len({tuple(row) for row in one}) == 3
    drawn = [sampled(seed).tolist() for seed in (1, 2, None, None)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[i + 1 :])
    keras.utils.set_random_seed(7)
    unseeded = sampled(None)
    keras.utils.set_random_seed(7)
    np.testing.assert_array_equal(sampled(None), unseeded)


def test_samples_follow_the_model(model):
    """The first token of many rows is distributed as the logits say."""
    rows = 1000
    logits = ops.convert_to_numpy(model(np.array([[3, 1, 4]], "int32")))[0, -1].astype("float64")
    p = np.exp(logits / 4)
    p[0] = 0
    p /= p.sum()
    tokens = model.generate(np.array([[3, 1, 4]] * rows), 1, temperature=4.0, seed=0)[:, 0]
    got = np.bincount(tokens, minlength=V)
    assert got[0] == 0
    assert (np.square(got - rows * p)[1:] / (rows * p[1:])).sum() < 30  # chi-square, 9 degrees: 1 of 2000 is above


def test_pad_id(model, plain):
    """It is never generated; where there is none, 0 is a token as any other."""
    prompt = np.full((64, 3), 5)
    tokens = model.generate(prompt, N, temperature=50.0, seed=0)
    assert set(tokens.flat) == set(range(1, V))
    assert set(plain.generate(prompt, N, temperature=50.0, seed=0).flat) == set(range(V))


def test_without_padding(plain):
    """With `pad_id=None` a 0 in the prompt is read, and lists of other lengths are padded all the same."""
    prompts = [[3, 0, 4], [0, 5], [9, 2, 0, 0]]
    expected = np.array([by_hand(plain, prompt) for prompt in prompts])
    np.testing.assert_array_equal(plain.generate(prompts, N), expected)
    assert plain.generate(prompts[2], N).tolist() == expected[2].tolist()
    assert by_hand(plain, [9, 2]) != expected[2].tolist()


def test_another_pad_id():
    """Rows are filled up with it and it is never generated, while 0 may be."""
    other = make_model(pad_id=V - 1)
    expected = np.array([by_hand(other, prompt) for prompt in PROMPTS])
    np.testing.assert_array_equal(other.generate(PROMPTS, N), expected)
    padded = np.array([[3, 1, 4, 10], [1, 10, 5, 10], [9, 2, 6, 5]])
    np.testing.assert_array_equal(other.generate(padded, N), expected)
    stop = int(expected[0, 0])
    row = other.generate(PROMPTS[0], N, stop_tokens=(stop,))
    assert row.tolist() == [stop, *(V - 1,) * (N - 1)]


def test_changed_weights_are_used():
    """By `generate` and `stream`, after `set_weights` and after `fit`."""
    model = make_model()
    before = model.generate(PROMPTS[0], N).tolist()
    list(model.stream(PROMPTS[0], N))
    random_weights(model, 8)
    after = by_hand(model, PROMPTS[0])
    assert after != before
    assert model.generate(PROMPTS[0], N).tolist() == after
    assert list(model.stream(PROMPTS[0], N)) == after
    model.compile(keras.optimizers.SGD(10.0))
    model.fit(np.array([[1, 2, 3, 4]] * 4), verbose=0)
    trained = by_hand(model, PROMPTS[0])
    assert trained != after
    assert model.generate(PROMPTS[0], N).tolist() == trained
    assert list(model.stream(PROMPTS[0], N)) == trained


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_weights_are_used():
    """`quantize` after the first call replaces the weights by others."""
    model = make_model()
    model.generate(PROMPTS[0], N)
    model.quantize("int8")
    assert model.generate(PROMPTS[0], N).tolist() == by_hand(model, PROMPTS[0])


def test_own_sampler(model):
    """Any function `(logits, u) -> token`, which sees the logits of the step and a uniform number for each row."""

    def second(logits, u):
        assert len(u.shape) == 1
        return ops.top_k(logits, 2)[1][:, 1]

    tokens = model.generate(PROMPTS[0], 1, second)
    logits = ops.convert_to_numpy(model(np.array([PROMPTS[0]], "int32")))[0, -1].copy()
    logits[0] = -np.inf
    assert tokens.tolist() == [np.argsort(-logits)[1]]


def test_sampler_by_name(model, greedy):
    np.testing.assert_array_equal(model.generate(PROMPTS, N, "greedy"), greedy)
    np.testing.assert_array_equal(model.generate(PROMPTS, N, top_k=1), greedy)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(PROMPTS, N, "greedy", temperature=0.5)
    with pytest.raises(ValueError, match=r"`top_p`.*2"):
        model.stream(PROMPTS, N, top_p=2)


def test_the_engine_takes_any_model_of_the_protocol():
    """Not only models of this library: the state protocol is all it asks for."""

    class Successor:
        """The next token is the last one plus the number of tokens before, modulo 10, plus 1."""

        vocab_size, pad_id, variables = V, 0, ()
        trainable_variables = non_trainable_variables = ()

        def initial_state(self, batch_size, max_length=None):
            return ops.zeros((batch_size,), "int32")

        def logits(self, tokens, count):
            return ops.one_hot((tokens + count) % 10 + 1, V)

        def __call__(self, tokens, mask=None, initial_state=None, return_state=False, training=False):
            valid = ops.cast(mask, "int32")
            count = initial_state[:, None] + ops.cumsum(valid, 1) - valid
            return self.logits(tokens, count), initial_state + ops.sum(valid, 1)

        def step(self, token, count):
            return self.logits(token, count), count + ops.cast(token != 0, "int32")

    def by_rule(row):
        for _ in range(N):
            row = [*row, (row[-1] + len(row) - 1) % 10 + 1]
        return row[-N:]

    tokens = decoding.generate(Successor(), PROMPTS, N, decoding.Greedy())
    np.testing.assert_array_equal(tokens, [by_rule(row) for row in PROMPTS])


def test_a_stateful_model_generates_too(greedy):
    """From its prompt alone; what it carries from batch to batch stays as it is."""
    model = make_model(stateful=True)
    np.testing.assert_array_equal(model.generate(PROMPTS, N), greedy)
    tokens = np.array([[1, 2, 3], [4, 5, 6]], "int32")
    model.reset_state()
    once, twice = (ops.convert_to_numpy(model(tokens)) for _ in range(2))
    model.reset_state()
    np.testing.assert_allclose(ops.convert_to_numpy(model(tokens)), once, atol=1e-6)
    np.testing.assert_array_equal(model.generate(PROMPTS, N), greedy)
    assert list(model.stream(PROMPTS[0], N)) == greedy[0].tolist()
    np.testing.assert_allclose(ops.convert_to_numpy(model(tokens)), twice, atol=1e-6)


@pytest.mark.parametrize("function", ["generate", "stream"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], N), "non-empty"),
        (([[]], N), "non-empty"),
        ((np.zeros((0, 3), "int32"), N), r"\(0, 3\)"),
        (([[1, 2], []], N), r"at least one valid token.*\[1\]"),
        (([[1, 2], [0, 0]], N), r"at least one valid token.*\[1\]"),
        ((np.array([[1, 2], [0, 0]]), N), r"at least one valid token.*\[1\]"),
        (([3, V], N), "from 0 to 10.*3 to 11"),
        (([3, -1], N), "from 0 to 10.*-1 to 3"),
        (([1.5, 2.0], N), "float64"),
        (([[1.5, 2.0], [1.0]], N), "float64"),
        (([True, False], N), "bool"),
        ((np.ones((2, 3, 4), "int32"), N), r"\(2, 3, 4\)"),
        ((5, N), r"shape \(\)"),
        (([1, 2], 0), "`max_new_tokens` must be >= 1. Received: 0"),
        (([1, 2], -3), "Received: -3"),
    ],
)
def test_errors(model, function, arguments, named):
    """At the call, also of `stream`, with what was received."""
    with pytest.raises(ValueError, match=named):
        getattr(model, function)(*arguments)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (np.ones((2, 3), bool), r"\(2, 2\).*\(2, 3\)"),
        (np.ones((2, 2), "int32"), "int32"),
        (np.ones((2,), bool), r"\(2,\)"),
        (np.array([[True, True], [False, False]]), r"\[1\]"),
    ],
)
def test_mask_errors(model, mask, named):
    with pytest.raises(ValueError, match=named):
        model.generate([[1, 2], [3, 4]], N, mask=mask)
