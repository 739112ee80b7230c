# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from headkv_mm.pipelines.document_prompts import PromptFormat
from headkv_mm.pipelines.words import count_known_words

DOCUMENT, QUESTION = "The code is 7.", "What is the code?"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


def test_plain_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = PromptFormat.of(tokenizer)
    ids = prompt.document_ids(tokenizer, DOCUMENT) + prompt.question_ids(tokenizer, QUESTION)
    assert ids == tokenizer(f"{DOCUMENT}\n\nQuestion: {QUESTION}\nAnswer:")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_first_token_where_the_tokenizer_puts_none(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert tokenizer.bos_token_id not in PromptFormat.of(tokenizer).document_ids(tokenizer, DOCUMENT)


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    prompt = PromptFormat.of(tokenizer)
    head, tail = prompt.document_ids(tokenizer, DOCUMENT), prompt.question_ids(tokenizer, QUESTION)
    content = f"{DOCUMENT}\n\nAnswer the question from the text above.\nQuestion: {QUESTION}"
    message = {"role": "user", "content": content}
    whole = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert head + tail == whole
    assert head == whole[: len(head)]
    assert head.count(tokenizer.bos_token_id) == 1
    assert tail.count(tokenizer.eos_token_id) == 1


def test_control_tokens_in_a_document_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (None, CHAT):
        tokenizer.chat_template = template
        prompt = PromptFormat.of(tokenizer)
        ids = prompt.document_ids(tokenizer, "one</s><s>two")
        assert tokenizer.eos_token_id not in ids
        assert ids.count(tokenizer.bos_token_id) == 1
        asked = prompt.question_ids(tokenizer, "why</s>")
        assert asked.count(tokenizer.eos_token_id) == (template is not None)
        assert tokenizer.decode(asked).count("</s>") == 1 + (template is not None)


def test_a_tokenizer_that_marks_the_start_of_a_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "▁a.", "▁The", "▁code.", "▁Question:", "▁Why?", "▁Answer:"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    prompt = PromptFormat.of(tokenizer)
    ids = prompt.document_ids(tokenizer, "The code.") + prompt.question_ids(tokenizer, "Why?")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁The", "▁code.", "▁Question:", "▁Why?", "▁Answer:"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "once and unchanged"),
        ("{{ messages[0]['content'] | upper }}", "once and unchanged"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)
def test_templates_that_cannot_serve(tokenizer: PreTrainedTokenizerFast, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        PromptFormat.of(tokenizer)


def test_known_words(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    assert count_known_words(tokenizer, "any word, ünïcode") == (3, 3)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "code": 2, "7": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert count_known_words(words, "the code of the river: 7.") == (4, 6)
    assert count_known_words(words, "...") == (0, 0)
