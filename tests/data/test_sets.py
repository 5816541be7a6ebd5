"""Published sets: how texts that were cut into words are put together again, and how files are read by recipe."""

from pathlib import Path

import pytest

from nanodlm.config import Config, DataConfig
from nanodlm.data import sets, tokenizer
from nanodlm.errors import NanodlmError
from nanodlm.stages import table


@pytest.mark.parametrize(
    ("recipe", "cut", "whole"),
    [
        ("lambada", "  “Stop,” she said ", '\n"Stop," she said'),
        ("wikitext2", " = = Early years = = ", " == Early years ==\n"),
        (
            "wikitext103",
            'the " two @-@ part " play ( 9 @,@ 000 seats ) , now',
            'the "two-part" play (9,000 seats), now\n',
        ),
        ("ptb", "the N N bonds of $ N that n't the group 's <unk>", "the 1 1 bonds of $1 thatn't the group's ?"),
        ("lm1b", "He 's sure : ' yes ' ( http : / / a.b ) , no ?", "He's sure: 'yes' (http://a.b), no?"),
        ("ag_news", "As it is , kept", "As it is , kept"),
    ],
)
def test_published_rules_undo_how_texts_were_cut(recipe: str, cut: str, whole: str) -> None:
    assert sets.detokenised(cut, sets.RECIPES[recipe].changes) == whole


def test_a_set_is_read_by_recipe_line_by_line_or_as_files_are(tmp_path: Path) -> None:
    path, encoding = tmp_path / "test.txt", tokenizer.plain_bytes()
    path.write_text("a , b\n\nc\n")
    found = [sets.tokens(f"{name}{path}", DataConfig(), encoding) for name in ("", "lm1b=", "wikitext2=")]
    assert [bad.counts for _, bad in found] == [{}, {"empty": 1}, {"empty": 1}]
    read = [ids.tolist() for ids, _ in found]
    assert read == [[*b"a , b\n\nc\n", 256], [*b"a, b", 256, *b"c", 256], [*b"a, b\n", 256, *b"c\n", 256]]
    names = [sets.identity(f"{name}{path}", DataConfig()) for name in ("", "lm1b=")]
    assert [one["name"] for one in names] == ["test.txt", "lm1b"]
    with pytest.raises(NanodlmError, match=r"no lambada=nowhere.jsonl to score: it lies at .*\(licence: CC BY 4.0\)"):
        sets.identity("lambada=nowhere.jsonl", DataConfig())
    path.write_text("\n")
    with pytest.raises(NanodlmError, match="holds no text"):
        sets.tokens(f"lm1b={path}", DataConfig(), encoding)


def test_a_set_without_text_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    config = Config().replace(eval={"sets": str(tmp_path / "empty.txt")})
    with pytest.raises(NanodlmError, match=r"empty\.txt holds no text to score: check the file, or leave it out"):
        table.check(config, table.until("sample"))
    table.check(config, table.until("train"))
