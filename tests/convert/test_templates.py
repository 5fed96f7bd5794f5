"""The conversation template of a checkpoint: what its files say, used or named, never run."""

import json
import logging
import shutil

import pytest

from llava_jax import cli
from llava_jax.convert import Options, Target, convert, open_source, templates
from llava_jax.errors import ConfigError
from llava_jax.text.chat_template import jinja, recognise
from llava_jax.text.conversation import TEMPLATES
from tests.convert import tiny
from tests.text.test_chat_template import CHATML, HF_VICUNA, MISTRAL, PHI


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny.tokenizer(folder / "tokenizer")
    for to in ("hf", "original"):
        tiny.save(folder / to, to, tiny.TEXT, tokenizer=tokenizer)
        shutil.rmtree(folder / to / "llava_jax")
    return folder


def with_template(made, folder, text, file="chat_template.jinja", kind="hf"):
    shutil.copytree(made / kind, folder)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    if file.endswith(".jinja"):
        (folder / file).write_text(text)
    else:
        path = folder / file
        data = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**data, "chat_template": text}))
    return folder


FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_foreign_template_is_named_wherever_it_stands(made, tmp_path, caplog, file):
    folder = with_template(made, tmp_path / "a", PHI, file)
    with caplog.at_level(logging.WARNING):
        assert open_source(folder).config.template == "vicuna_v1"
    (line,) = [r.getMessage() for r in caplog.records]
    assert file in line
    assert "vicuna_v1 is used instead (--template names another)" in line


@pytest.mark.parametrize(
    ("text", "name"), [(MISTRAL, "mistral_instruct"), (CHATML, "chatml_direct")]
)
def test_a_known_template_is_used_and_exported(made, tmp_path, caplog, text, name):
    folder = with_template(made, tmp_path / "a", text)
    with caplog.at_level(logging.WARNING):
        convert(folder, tmp_path / "b", Target("hf"))
    assert f"{name} is used" in caplog.text
    written = (tmp_path / "b" / "chat_template.jinja").read_text()
    assert recognise(written) == name
    assert open_source(tmp_path / "b").config.template == name
    shutil.rmtree(tmp_path / "b" / "llava_jax")  # as another program would read it
    assert open_source(tmp_path / "b").config.template == name


def test_vicuna_in_every_spelling_needs_no_word(made, tmp_path, caplog):
    several = [{"name": "rag", "template": PHI}, {"name": "default", "template": HF_VICUNA}]
    with caplog.at_level(logging.WARNING):
        for i, (text, file) in enumerate(
            [
                (HF_VICUNA, FILES[0]),
                (jinja(TEMPLATES["vicuna_v1"], True), FILES[0]),
                (several, FILES[3]),
            ]
        ):
            folder = with_template(made, tmp_path / str(i), text, file)
            assert open_source(folder).config.template == "vicuna_v1"
        assert open_source(made / "hf").config.template == "vicuna_v1"
        assert open_source(made / "original").config.template == "vicuna_v1"
    assert not caplog.records


def edited(made, folder, **fields):
    shutil.copytree(made / "original", folder)
    data = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "template"),
    [
        ("llava-llama-2-13b-chat", {}, "llava_llama_2"),
        ("a", {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, "llava_llama_2"),
        ("a", {"model_type": "llava_mistral"}, "mistral_instruct"),
        ("llava-med-v1.5-mistral-7b", {}, "mistral_instruct"),
        ("llava-v1.5-7b", {}, "vicuna_v1"),
        ("a", {"_name_or_path": "lmsys/vicuna-7b-v1.5"}, "vicuna_v1"),
    ],
)
def test_an_original_is_prompted_as_the_original_does(
    made, tmp_path, caplog, name, fields, template
):
    folder = edited(made, tmp_path / name, **fields)
    with caplog.at_level(logging.WARNING):
        assert open_source(folder).config.template == template
    assert ("--template names another" in caplog.text) == (template != "vicuna_v1")
    # and it stays that on the way through the other formats
    convert(folder, tmp_path / "b", Target("hf"))
    convert(tmp_path / "b", tmp_path / "c", Target("original"))
    assert open_source(tmp_path / "c").config.template == template


def test_a_checkpoint_folder_is_called_by_its_parent_too():
    assert templates._last("runs/llava-llama-2/checkpoint-100/") == "llava-llama-2_checkpoint-100"


def test_the_option_names_another(made, tmp_path, capsys):
    folder = with_template(made, tmp_path / "a", PHI)
    out = tmp_path / "b"
    assert cli.main(["convert", str(folder), str(out), "--to", "hf", "--template", "mpt"]) == 0
    assert recognise((out / "chat_template.jinja").read_text()) == "mpt"
    assert cli.main(["inspect", str(folder), "--template", "llava_v0"]) == 0
    assert "template llava_v0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no template 'vicuna'"):
        Options(template="vicuna")
