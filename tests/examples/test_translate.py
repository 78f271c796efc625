"""The translation example runs, in a small setting."""

import itertools

import translate

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}


def test_byte_pairs_can_be_undone():
    texts = ["The fan is on.", "Drücke die Taste (rot), dann warte - bitte!"]
    tokenizer = translate.byte_pairs(texts, 100)
    assert tokenizer.decode_batch([encoding.ids for encoding in tokenizer.encode_batch(texts)]) == texts
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[START]", "[END]")] == [0, 1, 2]


def test_translate(tmp_path, capsys):
    words = list(itertools.product(NUMBERS, repeat=4))
    pairs = [(f"{' '.join(row)}.", f"{' '.join(NUMBERS[word] for word in row)}.") for row in words]
    options = ["--minutes", "0.05", "--units", "32", "--layers", "1", "--vocabulary", "60", "--max-tokens", "12"]
    scores = translate.main([*options, "--out", str(tmp_path)], {"train": pairs[::2], "test": pairs[1:30:2]})
    assert list(scores) == ["Transformer", "Seq2Seq"]
    assert all(0 <= round(score, 6) <= 100 for score in scores.values())  # sacrebleu's best is 100.00000000000004
    printed = capsys.readouterr().out
    assert "313 sentences to train on, 15 held out" in printed
    assert (tmp_path / "translate.png").stat().st_size > 5_000
