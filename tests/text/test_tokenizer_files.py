import json

import pytest

from llava_jax.errors import ConfigError
from llava_jax.text.tokenizer import Tokenizer

TEXT = "the  cat</s>USER: <im_start> a"


@pytest.mark.parametrize("legacy", [False, True])
def test_saved_tokenizer_is_the_same(tmp_path, model, legacy):
    before = Tokenizer(model, legacy=legacy).with_tokens(["<im_start>", "<im_end>"])
    before.save(tmp_path, model_max_length=2048)
    after = Tokenizer.load(tmp_path)
    assert after.legacy is legacy
    assert after.special_tokens == before.special_tokens
    assert after.encode(TEXT, markup=True) == before.encode(TEXT, markup=True)
    assert after.model == before.model
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 2048
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == before.added


def test_padding_token_survives(tmp_path, tok):
    tok.with_tokens(["[PAD]"], pad_token="[PAD]").save(tmp_path)
    assert Tokenizer.load(tmp_path).pad_id == len(tok)
    tok.save(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert Tokenizer.load(tmp_path).pad_id == tok.unk_id


def test_missing_legacy_is_true_as_in_transformers_4(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert Tokenizer.load(tmp_path).legacy is True
    assert Tokenizer.load(tmp_path / "tokenizer.model", legacy=False).legacy is False


def test_tokens_of_added_tokens_json_alone(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 420, "<y>": 421}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<x>"]}')
    tokenizer = Tokenizer.load(tmp_path, legacy=False)
    ids = tokenizer.encode("a<x>b<y>", markup=True)
    assert 420 in ids
    assert 421 in ids
    assert tokenizer.decode(ids, skip_special=True) == "ab <y>"


def test_padding_token_of_an_old_folder(tmp_path, model):
    """As LLaVA v0 was saved: the padding token stands in special_tokens_map.json alone."""
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 420}')
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": null, "legacy": true}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == 420
    assert tokenizer.decode(tokenizer.encode("a[PAD]", markup=True), skip_special=True) == "a"
    newer = {"pad_token": "<unk>", "added_tokens_decoder": {"420": {"content": "[PAD]"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(newer))
    assert Tokenizer.load(tmp_path).pad_id == 0


def test_settings_without_effect_are_named(tmp_path, model, tok, caplog):
    tok.with_tokens(["<x>"]).save(tmp_path)
    Tokenizer.load(tmp_path)
    assert not caplog.records
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["add_bos_token"] = False
    config["added_tokens_decoder"]["420"]["rstrip"] = True
    path.write_text(json.dumps(config))
    Tokenizer.load(tmp_path)
    assert "add_bos_token=False, rstrip of <x>" in caplog.text


def test_errors_name_the_file(tmp_path, model):
    with pytest.raises(ConfigError, match=r"no tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not JSON at line 1"):
        Tokenizer.load(tmp_path)


def test_transformers_reads_our_files(tmp_path, im_tok):
    """On texts without double or leading spaces, which transformers 5 tokenises differently."""
    transformers = pytest.importorskip("transformers")
    im_tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: <im_start><im_end> the cat</s>USER: a"
    assert theirs(text).input_ids == im_tok.encode(text, markup=True)
    assert theirs.pad_token_id == im_tok.pad_id
    assert len(theirs) == len(im_tok)


def test_golden_folders(golden):
    for config in golden.glob("model/*/llava/tokenizer_config.json"):
        tokenizer = Tokenizer.load(config.parent)
        assert tokenizer.legacy is json.loads(config.read_text())["legacy"]
        added = config.with_name("added_tokens.json")
        assert tokenizer.added == (json.loads(added.read_text()) if added.exists() else {})


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_not_downloaded_is_called_that(tmp_path, tok, file):
    tok.save(tmp_path)
    if file == "tokenizer.json":
        (tmp_path / "tokenizer.model").unlink()
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ConfigError, match=f"{file} is a Git LFS pointer.*git lfs pull"):
        Tokenizer.load(tmp_path)
