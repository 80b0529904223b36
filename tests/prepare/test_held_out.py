"""What is held out: the rule on strings whose hashes were worked out apart, every predicate, and no way around them."""

import re
from pathlib import Path

import pytest

import andesvl_jax as avl
from andesvl_jax.prepare import held_out
from andesvl_jax.prepare.held_out import in_held_out_fifth, is_held_out, refuse
from andesvl_jax.prepare.packages import Package, fetch

PREPARE = Path(held_out.__file__).parent
WHOLE = re.compile("mlxtend|weui|gentelella|inferencebench", re.IGNORECASE)


def test_the_rule_is_sha256_modulo_5():
    """Sums of the digits of `printf %s STRING | sha256sum`, by the rule that 16 is 1 modulo 5."""
    import hashlib

    for text in ("1f9d1-200d-1f3a8", "a cat.", "é", "", "cars"):
        digits = sum(int(digit, 16) for digit in hashlib.sha256(text.encode()).hexdigest())
        assert in_held_out_fifth(text) == (digits % 5 == 0)
    share = sum(in_held_out_fifth(f"string {i}") for i in range(20_000)) / 20_000
    assert 0.19 < share < 0.21


def test_captions_are_held_out_whatever_their_case_and_spaces():
    words = [f"Word {i}" for i in range(100)]
    held = [word for word in words if held_out.caption(word)]
    assert held and held == [word for word in words if is_held_out(f"caption:  {word.upper()} \n")]


def test_every_skin_tone_is_held_out():
    for tone in held_out.SKIN_TONES:
        assert is_held_out(f"emoji:1f44b-{tone}") and is_held_out(f"emoji:{tone}")
    assert not held_out.skin_tone("1f3f") and not held_out.skin_tone("1f3f4")


@pytest.mark.parametrize("tag", ["ja", "ar", "ar-EG", "ja_JP", "AR"])
def test_unseen_languages(tag):
    assert is_held_out(f"language:{tag}")
    assert not any(is_held_out(f"language:{seen}") for seen in ("en", "zh", "de", "ru", "es", "arn", "jam"))


def test_keys_of_no_known_kind_are_mistakes():
    for key in ("emojis:1f600", "1f600", "caption:", ":x", ""):
        with pytest.raises(ValueError, match="expected kind:value"):
            is_held_out(key)
    assert not is_held_out("icon:home")


def test_refusals_name_the_place_and_the_key():
    with pytest.raises(avl.UserError, match="drawings: language:ja is held out for evaluation"):
        refuse("language:ja", "drawings")
    refuse("language:en", "drawings")


@pytest.mark.parametrize("name", [*held_out.PACKAGES, "@scope/weui", "MLxtend"])
def test_packages_that_are_held_out_whole_are_never_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("a client was started"))
    with pytest.raises(avl.UserError, match="is held out for evaluation"):
        fetch(Package("npm", name, "1.0", 1, "0" * 64, "MIT"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_their_names_stand_nowhere_but_in_the_refusals():
    files = [path for path in PREPARE.rglob("*") if path.suffix in (".py", ".html", ".js", ".json", ".txt")]
    assert [path.name for path in files if WHOLE.search(path.read_text(encoding="utf-8"))] == ["held_out.py"]
    assert len(WHOLE.findall(Path(held_out.__file__).read_text())) == 4
