"""Messages to ids and back, with the conventions of four families of chat templates.

The tokenizers are byte-level, so an ordinary id is a byte and the expected ids can be written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from tokenizers.decoders import Metaspace
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llmrl.data.chat import Chat
from llmrl.errors import UserError
from llmrl.tiny import byte_tokenizer, char_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
USER = [{"role": "user", "content": "Hi"}]
DIALOGUE = [*USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "2+2?"}]
SYSTEM = [{"role": "system", "content": "Sum."}, *USER]


def make_tokenizer(
    specials: list[str], *, eos: str | None, bos: str | None = None, adds_bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte tokenizer with a family's special tokens (ids from 259 on) in place of this project's."""
    backend = byte_tokenizer().backend_tokenizer
    backend.add_special_tokens(specials)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = None if template is None else (TEMPLATES / template).read_text()
    return tokenizer


def qwen() -> PreTrainedTokenizerFast:
    return make_tokenizer(["<|endoftext|>", "<|im_end|>"], eos="<|im_end|>", template="qwen.jinja")


def llama() -> PreTrainedTokenizerFast:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return make_tokenizer(specials, eos=specials[1], bos=specials[0], adds_bos=True, template="llama3.jinja")


def mistral() -> PreTrainedTokenizerFast:
    specials = ["<s>", "</s>", "[INST]", "[/INST]"]
    return make_tokenizer(specials, eos="</s>", bos="<s>", adds_bos=True, template="mistral.jinja")


def gemma() -> PreTrainedTokenizerFast:
    specials = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return make_tokenizer(specials, eos="<eos>", bos="<bos>", adds_bos=True, template="gemma.jinja")


FAMILIES = [qwen, llama, mistral, gemma]
Make = Callable[[], PreTrainedTokenizerFast]


def ids(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    """The ids of pieces: a special token's id, or the bytes of other text."""
    result: list[int] = []
    for piece in pieces:
        special = tokenizer.get_added_vocab().get(piece)
        result += piece.encode() if special is None else [special]
    return result


# --- render -----------------------------------------------------------------------------------------------------------


def test_qwen_style_prompt() -> None:
    start, end = "<|im_start|>", "<|im_end|>"
    expected = [start, "system\nSum.", end, "\n", start, "user\nHi", end, "\n", start, "assistant\n"]
    assert Chat(qwen()).render(SYSTEM) == ids(qwen(), *expected)
    assert "Be brief." in bytes(i for i in Chat(qwen()).render(USER) if i < 256).decode()


def test_llama_style_prompt_has_one_bos() -> None:
    head, tail, end = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    expected = ["<|begin_of_text|>"]
    for role, content in [("user", "Hi"), ("assistant", "Yo"), ("user", "2+2?")]:
        expected += [head, role, tail, "\n\n" + content, end]
    assert Chat(llama()).render(DIALOGUE) == ids(llama(), *expected, head, "assistant", tail, "\n\n")


def test_mistral_style_prompt_has_one_bos_and_ends_where_the_answer_begins() -> None:
    expected = ["<s>", "[INST]", " Hi ", "[/INST]", " Yo", "</s>", "[INST]", " 2+2? ", "[/INST]"]
    assert Chat(mistral()).render(DIALOGUE) == ids(mistral(), *expected)


def test_gemma_style_prompt_renames_the_role() -> None:
    start, end = "<start_of_turn>", "<end_of_turn>"
    expected = ["<bos>", start, "user\nHi", end, "\n", start, "model\nYo", end, "\n", start, "user\n2+2?", end, "\n"]
    assert Chat(gemma()).render(DIALOGUE) == ids(gemma(), *expected, start, "model\n")


@pytest.mark.parametrize("make", FAMILIES)
def test_render_is_a_flat_list_of_ints_and_equals_the_tokenizers_own(make: Make) -> None:
    tokenizer = make()
    rendered = Chat(tokenizer).render(DIALOGUE)
    assert type(rendered) is list
    assert {type(token) for token in rendered} == {int}
    own: Any = tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, tokenize=True)
    assert rendered == (own if isinstance(own, list) else list(own["input_ids"]))
    if tokenizer.bos_token_id is not None:
        assert rendered.count(tokenizer.bos_token_id) == 1


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    text = qwen().decode(Chat(qwen()).render(USER, tools=[tool]))
    assert '<tools>[{"type": "function"' in text
    assert "<tools>" not in qwen().decode(Chat(qwen()).render(USER))


def test_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[0]['content'] }}\nA:")
    for tokenizer in (qwen(), make_tokenizer(["</s>"], eos="</s>")):
        assert Chat(tokenizer, chat_template=str(file)).render(USER) == list(b"Q: Hi\nA:")


# --- text format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
def test_text_format_uses_no_template_and_only_a_default_bos(make: Make) -> None:
    tokenizer = make()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    chat = Chat(tokenizer, prompt_format="text")
    assert chat.render(SYSTEM) == [*bos, *b"Sum.Hi"]
    tokenizer.chat_template = None
    assert Chat(tokenizer, prompt_format="text").render(USER) == [*bos, *b"Hi"]


def test_text_format_adds_no_bos_where_the_tokenizer_adds_none() -> None:
    tokenizer = make_tokenizer(["<s>", "</s>"], eos="</s>", bos="<s>", adds_bos=False)
    assert Chat(tokenizer, prompt_format="text").render(USER) == list(b"Hi")


def test_text_format_does_not_double_a_bos_in_the_text() -> None:
    tokenizer = mistral()
    rendered = Chat(tokenizer, prompt_format="text").render([{"role": "user", "content": "<s>Hi"}])
    assert rendered == [tokenizer.bos_token_id, *b"Hi"]


def test_text_format_appends_no_eos_even_where_the_tokenizer_would() -> None:
    tokenizer = make_tokenizer(["</s>"], eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Hi")["input_ids"][-1] == tokenizer.eos_token_id
    assert Chat(tokenizer, prompt_format="text").render(USER) == list(b"Hi")


def test_text_format_joins_text_parts_and_refuses_others() -> None:
    chat = Chat(qwen(), prompt_format="text")
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat.render([{"role": "user", "content": parts}]) == list(b"a b")
    with pytest.raises(UserError, match="cannot show a part with type, image, text"):
        chat.render([{"role": "user", "content": [{"type": "image", "image": "x.png", "text": None}]}])
    with pytest.raises(UserError, match="cannot show tools"):
        chat.render(USER, tools=[{"type": "function"}])


# --- stop tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (qwen, ["<|im_end|>"]),
        (llama, ["<|end_of_text|>", "<|eot_id|>"]),
        (mistral, ["</s>"]),
        (gemma, ["<eos>", "<end_of_turn>"]),
    ],
)
def test_stop_tokens_are_eos_and_the_templates_turn_end(make: Make, expected: list[str]) -> None:
    tokenizer = make()
    assert Chat(tokenizer).stop_token_ids == tuple(tokenizer.convert_tokens_to_ids(expected))
    assert Chat(tokenizer, prompt_format="text").stop_token_ids == (tokenizer.eos_token_id,)


def test_base_model_eos_with_a_chat_template_still_stops_at_the_turn_end() -> None:
    tokenizer = make_tokenizer(["<|endoftext|>", "<|im_end|>"], eos="<|endoftext|>", template="qwen.jinja")
    assert Chat(tokenizer).stop_token_ids == (259, 260)


@pytest.mark.parametrize(("eos", "expected"), [(7, (260, 7)), ([260, 7, 8], (260, 7, 8)), (None, (260,))])
def test_generation_config_adds_its_eos_tokens(eos: int | list[int] | None, expected: tuple[int, ...]) -> None:
    chat = Chat(qwen(), generation_config=GenerationConfig(eos_token_id=eos))
    assert chat.stop_token_ids == expected


def test_only_a_special_token_is_a_turn_end(tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    for end, expected in [("\\n", (260,)), ("\\n###", (260,)), (" <|endoftext|>", (260, 259))]:
        file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + end + "' }}{% endfor %}")
        assert Chat(qwen(), chat_template=str(file)).stop_token_ids == expected


def test_template_for_a_single_turn_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "single.jinja"
    file.write_text("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0]['content'] }}")
    chat = Chat(qwen(), chat_template=str(file))
    assert chat.stop_token_ids == (260,)
    assert chat.render(USER) == list(b"Hi")


def test_pad_token() -> None:
    assert Chat(byte_tokenizer()).pad_token_id == 256
    assert Chat(llama()).pad_token_id == llama().eos_token_id


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
def test_decode_drops_one_stop_token_at_the_end_and_nothing_else(make: Make) -> None:
    tokenizer = make()
    chat = Chat(tokenizer)
    for stop in chat.stop_token_ids:
        name = tokenizer.convert_ids_to_tokens(stop)
        assert chat.decode([*b"Hi .", stop]) == "Hi ."
        assert chat.decode([*b"a", stop, *b"b", stop]) == f"a{name}b"
        assert chat.decode([*b"a", stop, stop]) == f"a{name}"
        assert chat.decode([stop]) == ""
    assert chat.decode(list(b"  cut off\n")) == "  cut off\n"
    assert chat.decode([]) == ""
    assert chat.parse([*b"4", chat.stop_token_ids[0]]) == {"role": "assistant", "content": "4"}


def test_special_tokens_stay_inside_and_where_they_stop_nothing() -> None:
    tokenizer = make_tokenizer(["<think>", "</think>", "<|endoftext|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.chat_template = (TEMPLATES / "qwen.jinja").read_text()
    chat = Chat(tokenizer)
    assert chat.decode(ids(tokenizer, "<think>", "x", "</think>", "4", "<|im_end|>")) == "<think>x</think>4"
    assert chat.decode(ids(tokenizer, "4", "</think>")) == "4</think>"
    assert chat.decode(ids(tokenizer, "4", "<|endoftext|>")) == "4<|endoftext|>"
    assert chat.decode(ids(tokenizer, "4", "<|pad|>")) == "4<|pad|>"


def test_decode_cleans_up_no_spaces_even_where_the_tokenizer_would() -> None:
    tokenizer = qwen()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(list(b"he said .")) == "he said."
    assert Chat(tokenizer).decode(list(b"do n't , he said .")) == "do n't , he said ."


def test_leading_space_of_a_continuation_survives_decoders_that_drop_it() -> None:
    """Decoders like SentencePiece's drop the first space, which would break the indentation of code."""
    tokenizer = make_tokenizer(["<|im_end|>"], eos="<|im_end|>", template="qwen.jinja")
    tokenizer.backend_tokenizer.add_tokens([AddedToken("\u2581x", normalized=False)])
    tokenizer.backend_tokenizer.decoder = Metaspace()
    completion = [tokenizer.convert_tokens_to_ids("\u2581x"), *b"=1"]
    assert tokenizer.decode(completion) == "x=1"
    assert Chat(tokenizer, prompt_format="text").decode(completion) == " x=1"
    assert Chat(tokenizer).decode(completion) == "x=1"


def test_unfinished_character_at_the_end_becomes_a_replacement_character() -> None:
    assert Chat(byte_tokenizer()).decode([*b"ab", 0xE2, 0x82]) == "ab\ufffd"


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_encoding_and_decoding_round_trips(prompt_format: str) -> None:
    tokenizer = byte_tokenizer()
    chat = Chat(tokenizer, prompt_format=prompt_format)
    text = "  <think>\u00e9 \U0001f642</think>\n\\boxed{4} "
    assert chat.decode([*text.encode(), tokenizer.eos_token_id]) == text


def test_small_alphabets_work_in_both_formats() -> None:
    tokenizer = char_tokenizer("0123456789+= ", ["\\boxed{"])
    chat, text = Chat(tokenizer), Chat(tokenizer, prompt_format="text")
    messages = [{"role": "user", "content": "1+1="}]
    start, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|eos|>"])
    assert chat.render(messages) == [start, *tokenizer.encode("1+1="), eos, start]
    assert text.render(messages) == tokenizer.encode("1+1=")
    assert chat.stop_token_ids == text.stop_token_ids == (eos,)
    assert text.decode([*tokenizer.encode(" 2"), eos]) == " 2"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_no_chat_template_is_explained() -> None:
    with pytest.raises(UserError, match=r"no chat template: set data.prompt_format to `text`.*data.chat_template"):
        Chat(make_tokenizer(["</s>"], eos="</s>"))


def test_missing_template_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.chat_template .*absent\.jinja: cannot be read"):
        Chat(qwen(), chat_template=str(tmp_path / "absent.jinja"))


def test_a_template_with_text_format_is_refused() -> None:
    with pytest.raises(UserError, match="uses no template"):
        Chat(qwen(), prompt_format="text", chat_template=str(TEMPLATES / "qwen.jinja"))


@pytest.mark.parametrize(
    ("make", "message"), [(gemma, "There is no system role here"), (mistral, "Only user and assistant")]
)
def test_errors_of_a_template_are_reported(make: Make, message: str) -> None:
    with pytest.raises(UserError, match=rf"roles system, user: {message}.*data.system_prompt"):
        Chat(make()).render(SYSTEM)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}", "line 1 fails"),
        ("\n{% endif %}", "line 2 fails"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("", "the prompt is empty"),
    ],
)
def test_broken_templates_are_explained(source: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text(source)
    with pytest.raises(UserError, match=message):
        Chat(qwen(), chat_template=str(file)).render(USER)


def test_syntax_errors_in_a_template_are_found_before_the_first_prompt(tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("ok\n{% if %}")
    with pytest.raises(UserError, match="line 2 fails"):
        Chat(qwen(), chat_template=str(file))


def test_tokenizer_without_eos() -> None:
    tokenizer = make_tokenizer([], eos=None)
    with pytest.raises(UserError, match="no eos token"):
        Chat(tokenizer, prompt_format="text")
    chat = Chat(tokenizer, prompt_format="text", generation_config=SimpleNamespace(eos_token_id=[5]))
    assert (chat.stop_token_ids, chat.pad_token_id) == ((5,), 5)
