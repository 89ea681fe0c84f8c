"""Small random models and tokenizers that need no download: sizes and a seed in, Hugging Face objects out.

They are ordinary `PreTrainedModel`s and `PreTrainedTokenizerFast`s: `save_pretrained` and `Auto*.from_pretrained` work
on them, so everything that runs on a hub model runs on them. torch is imported only when a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from llmrl.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TINY_ARCHS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2")
"""Architectures that `build_tiny_model` can build."""

MAX_POSITIONS = 4096
"""Longest sequence of a tiny model, in tokens, unless it is made with another."""
PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|eos|>"
"""Ends a turn, and with it a completion."""
START_TOKEN = "<|im_start|>"
UNK_TOKEN = "<|unk|>"
"""Replaces characters that are not in the alphabet of `char_tokenizer`."""

BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAR_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""Leaves out roles, because a small alphabet may not be able to spell `assistant`."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per UTF-8 byte; it encodes and decodes any text without loss.

    Ids 0..255 are the bytes themselves, 256 is `<|pad|>`, 257 `<|eos|>` (ends a turn), 258 `<|im_start|>`.
    (When it is saved beside a qwen2 model and loaded again, transformers turns it into a Qwen2Tokenizer: ids stay the
    same, but text is normalized to NFC first.)

    Returns:
        A tokenizer with 259 tokens and a ChatML-like chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD_TOKEN, EOS_TOKEN, START_TOKEN])
    # None must be explicit: otherwise Qwen2Tokenizer adds its own unknown token, with an id beyond the vocabulary.
    return _wrap(tokenizer, BYTE_CHAT_TEMPLATE, unk_token=None)


def char_tokenizer(characters: str, special_tokens: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    r"""Build a tokenizer with one token per character and one per special string.

    Ids follow the order given: the characters, `<|unk|>`, `<|pad|>`, `<|eos|>`, `<|im_start|>`, the special strings.
    Special strings such as `<think>` or `\boxed{` are ordinary text to `decode`: `skip_special_tokens` keeps them. Each
    byte of any other character becomes `<|unk|>`, which decodes to that text. (When it is saved beside a qwen2 model
    and loaded again, transformers turns it into a Qwen2Tokenizer, which drops such characters.)

    Args:
        characters: the alphabet, ASCII; repeated characters count once.
        special_tokens: strings of two or more characters, each of which becomes one token.

    Raises:
        UserError: no characters, characters outside ASCII, or a special string shorter than two characters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special_tokens = list(dict.fromkeys(special_tokens))
    if not characters or not characters.isascii():
        raise UserError(f"char_tokenizer: characters is {characters!r}: give at least one, ASCII only")
    if short := [token for token in special_tokens if len(token) < 2]:
        raise UserError(f"char_tokenizer: special tokens {short} are too short; put single characters in `characters`")
    stand_ins = _byte_characters()
    names = [*dict.fromkeys(stand_ins[ord(character)] for character in characters), UNK_TOKEN]
    # Byte-level BPE without merges rather than a plain word list: Qwen2Tokenizer can load no other kind.
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token=UNK_TOKEN)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([UNK_TOKEN, PAD_TOKEN, EOS_TOKEN, START_TOKEN])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in special_tokens])
    return _wrap(tokenizer, CHAR_CHAT_TEMPLATE, unk_token=UNK_TOKEN)


def build_tiny_model(
    arch: str,
    *,
    vocab_size: int,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 128,
    max_position_embeddings: int = MAX_POSITIONS,
    tie_word_embeddings: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Build a causal language model with random float32 weights on the CPU, in eval mode.

    The weights depend only on `arch`, the sizes and `seed`; the global random state does not change. The model has no
    bos, eos or pad id unless `overrides` gives them (`eos_token_id=257` ...): the families' defaults are other tokens
    here.

    Args:
        arch: one of `TINY_ARCHS`.
        vocab_size: number of tokens, `len(tokenizer)`.
        hidden_size: width of the residual stream, a multiple of `num_heads`.
        num_layers: transformer blocks.
        num_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads.
        intermediate_size: width of the MLP.
        max_position_embeddings: longest sequence, in tokens.
        tie_word_embeddings: share the weights of input embedding and output head.
        seed: seed of the weights.
        overrides: further fields of the family's configuration class (`head_dim`, `sliding_window` ...), or
            `attn_implementation`.

    Raises:
        UserError: unknown `arch`, or sizes that do not divide.
    """
    if arch not in TINY_ARCHS:
        raise UserError(f"tiny model: unknown architecture {arch!r}; choose one of {', '.join(TINY_ARCHS)}")
    for name, whole, part in [
        ("hidden_size", hidden_size, num_heads),
        ("num_heads", num_heads, num_kv_heads),
    ]:
        if whole % part:
            raise UserError(f"tiny model: {name} {whole} is not a multiple of {part}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    head_dim = hidden_size // num_heads
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if arch == "gemma2":
        fields["query_pre_attn_scalar"] = overrides.get("head_dim", head_dim)
    attention = {key: overrides.pop(key) for key in ["attn_implementation"] if key in overrides}
    config = AutoConfig.for_model(arch, **(fields | overrides))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also reseed the accelerators, whose state is not saved here.
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    return model.eval()


def _byte_characters() -> list[str]:
    """Return the visible character that represents each byte in byte-level vocabularies, in byte order.

    Printable Latin-1 characters represent themselves; the 68 other bytes take the code points from 256 on.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(0xA1, 0xAC + 1),
        *range(0xAE, 0xFF + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _wrap(tokenizer: Tokenizer, chat_template: str, unk_token: str | None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[START_TOKEN],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        unk_token=unk_token,
    )
    wrapped.chat_template = chat_template
    return wrapped


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[dict[str, str]],
    *,
    output_dir: str | Path,
    max_steps: int,
    learning_rate: float = 2e-3,
    batch_size: int = 16,
    seed: int = 0,
    stop: Callable[[int], bool] | None = None,
) -> int:
    """Fine-tune a tiny model in place on rows with `prompt` and `completion` (TRL's SFTTrainer, one process, CPU).

    The learning rate rises over 20 steps and then falls linearly to 0 at `max_steps`.

    Args:
        model: the model; in eval mode afterwards.
        tokenizer: its tokenizer.
        examples: the rows.
        output_dir: TRL needs a folder; nothing of value is left in it.
        max_steps: optimizer steps at most.
        learning_rate: its peak.
        batch_size: rows per step.
        seed: seed of the order of the rows.
        stop: called with the number of steps after each one; training ends when it returns True.

    Returns:
        The number of steps done.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if stop is not None and stop(state.global_step):
                control.should_training_stop = True

    arguments = SFTConfig(
        output_dir=str(output_dir),
        seed=seed,
        per_device_train_batch_size=batch_size,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=20,
        adam_beta2=0.98,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[Stop()],
    )
    trainer.train()
    model.eval()
    return trainer.state.global_step
